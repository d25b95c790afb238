"""Documents that are kept apart: where each begins is read from the tokens, since every document begins with its BOS.

What comes of it is made on the device and has the shape of the tokens, so that neither a compiled graph nor a recorded
one depends on the text. Source: parameter-golf #1530 (attention), #1851 and #1855 (smear gate).
"""

import torch
from torch import Tensor


def reach(tokens: Tensor, bos_id: int, before: Tensor | None) -> Tensor:
    """How many positions before its own each token's document goes back: (B, T) int64 to (B, T) int32, 0 at a BOS.

    before: (B,) the same of the positions before the first ones, None at a start: tokens in front of the first BOS are
    then the end of a document that the rows' start cuts.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.int32)
    # Where the document began that the first position is in, if that is no BOS: 0, or a place before it.
    first = (
        torch.zeros_like(tokens[:, :1], dtype=torch.int32) if before is None else -1 - before.to(torch.int32)[:, None]
    )
    begun = torch.where(tokens == bos_id, place, first)
    return place - begun.cummax(dim=1).values
