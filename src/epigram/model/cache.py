"""What the forward remembers between its calls: keys and values, the last token, the last embedding, and how far back
the document goes that it is in.

Generation reads a token at a time, a streaming score many thousands; both continue what the cache holds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from epigram.attention.base import Attend
from epigram.model.config import ModelConfig

Matrices = tuple[dict[str, tuple[Tensor, ...]], dict[int, Tensor]]
"""The layers' weights as products take them: each bank's by layer, and the projections of value embeddings."""


class LayerCache:
    """Keys and values of one layer, of which at most `keep` positions stay visible.

    The buffer doubles when it is full and drops what no later position can see, so appending costs amortised O(1).
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._buffer: Tensor | None = None  # (2, B, capacity, K, D)
        self._start = self._end = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, T, K, D) keys and values; returns all that the new positions may see, oldest first."""
        added = k.shape[1]
        if added >= self.keep:
            return self._replace(k, v)
        buffer = self._room_for(added, k)
        buffer[0, :, self._end : self._end + added] = k
        buffer[1, :, self._end : self._end + added] = v
        self._end += added
        keys, values = buffer[:, :, self._start : self._end]
        self._start = max(self._start, self._end - self.keep)
        return keys, values

    def _replace(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same for more new positions than stay visible: a buffer that held them all would be mostly useless."""
        if self._buffer is not None:
            old = self._buffer[:, :, self._start : self._end]
            k, v = torch.cat([old[0], k], dim=1), torch.cat([old[1], v], dim=1)
        self._buffer = torch.stack([k[:, -self.keep :], v[:, -self.keep :]])
        self._start, self._end = 0, self._buffer.shape[2]
        return k, v

    def _room_for(self, added: int, like: Tensor) -> Tensor:
        used = self._end - self._start
        if self._buffer is not None and self._end + added <= self._buffer.shape[2]:
            return self._buffer
        capacity = max(2 * (used + added), 64)
        grown = like.new_empty(2, like.shape[0], capacity, *like.shape[2:])
        if self._buffer is not None:
            grown[:, :, :used] = self._buffer[:, :, self._start : self._end]
        self._buffer, self._start, self._end = grown, 0, used
        return grown


class Cache:
    """The state of a batch of sequences that are read piece by piece.

    context_len: positions that full-attention layers may look back, their own included; windowed layers keep their
    window. Never look further than training did: the score falls apart beyond. It also fixes the rotary base. limits:
    such a number for each layer instead of context_len, 0 for the latter. attend: the backend of all layers; None for
    those of the model. While a cache is used the model's weights stay as they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        context_len: int,
        *,
        limits: Sequence[int] = (),
        attend: Attend | None = None,
    ) -> None:
        self.context_len = context_len
        self.attend = attend
        self.position = 0  # of the next token
        self.previous_token: Tensor | None = None  # (B,)
        self.previous_embedding: Tensor | None = None  # (B, 1, D)
        self.reach: Tensor | None = None  # (B,) of the last token, where documents are isolated
        self.matrices: Matrices | None = None  # without gradient
        limits = limits or (0,) * config.num_layers
        assert len(limits) == config.num_layers, "one limit a layer"
        self.windows = [_window(config.layer_window(layer), limit or context_len) for layer, limit in enumerate(limits)]
        # A layer that looks `window` back needs that many old keys beside the new ones.
        self.layers = [LayerCache(keep=window) for window in self.windows]

    def advance(self, tokens: Tensor, reach: Tensor | None) -> None:
        """Tokens (B, T) were read; reach: (B, T), see `epigram.model.documents`."""
        self.position += tokens.shape[1]
        self.previous_token = tokens[:, -1]
        self.reach = None if reach is None else reach[:, -1]


def _window(own: int, context_len: int) -> int:
    """A layer's window, where no more than `context_len` positions, the own one included, may be looked at; 0 for the
    own one alone."""
    return min(own or context_len, context_len - 1)
