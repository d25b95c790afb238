"""A finished model in Python: `epigram.load(path)` gives an object that generates, scores text, and shows its logits.

model = epigram.load("model.epigram")
print(model.generate("The list method"))
print(model.score("Some text.").bpb)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epigram.data.text_codec import Decoder, TextCodec
from epigram.data.tokenizer import Tokenizer
from epigram.errors import UserError
from epigram.evaluation.scorer import token_nlls
from epigram.evaluation.windows import Method, usual_stride
from epigram.model.generate import Sampling, stream
from epigram.model.gpt import GPT


@dataclass(frozen=True)
class TextScore:
    """What a model lost on a text, token by token.

    tokens: (n,) ids after the begin-of-document token. nats: (n,) float32. bytes: (n,) int64 bytes of text.
    """

    tokens: NDArray[np.uint16]
    nats: NDArray[np.float32]
    bytes: NDArray[np.int64]

    @property
    def bpb(self) -> float:
        """Bits per byte of the text."""
        return float(self.nats.sum(dtype=np.float64) / math.log(2) / self.bytes.sum())


@dataclass(frozen=True)
class Model:
    """A model with its tokenizer, ready to use.

    context_len: the longest sequence of its training; generation and scoring look no further back. info: what the
    artifact says of itself. transform: of text before it is tokenized (`epigram.data.transforms`), "" for none; texts
    go in and come out as they are written.
    """

    gpt: GPT
    tokenizer: Tokenizer
    context_len: int
    info: dict[str, Any]
    transform: str = ""

    def generate(self, prompt: str, num_tokens: int = 200, *, stop: str | Sequence[str] = (), **sampling: Any) -> str:
        """The continuation of `prompt`: up to `num_tokens` tokens, or until a text in `stop` appears (it is left out).

        sampling: temperature, top_k, top_p, seed; see `epigram.model.generate.Sampling`.
        """
        return "".join(self.stream(prompt, num_tokens, stop=stop, **sampling))

    def stream(
        self, prompt: str, num_tokens: int = 200, *, stop: str | Sequence[str] = (), **sampling: Any
    ) -> Iterator[str]:
        """As `generate`, in pieces of valid text as they come. UserError for a prompt that it cannot represent."""
        known = [field.name for field in fields(Sampling)]
        if unknown := sorted(sampling.keys() - known):
            raise TypeError(f"generate has no setting {', '.join(unknown)}: it has {', '.join(known)}")
        if num_tokens < 0:
            raise UserError(f"num_tokens = {num_tokens} must be at least 0")
        try:
            settings = Sampling(**sampling)
        except ValueError as error:
            raise UserError(str(error)) from error
        codec = TextCodec(self.tokenizer, self.transform)
        ids = codec.encode(prompt)
        tokens = stream(
            self.gpt,
            ids.tolist(),
            num_tokens,
            settings,
            context_len=self.context_len,
            banned=silent_ids(self.tokenizer),
        )
        return _until((stop,) if isinstance(stop, str) else stop, _texts(codec.decoder(ids), tokens))

    def score(self, text: str, *, seq_len: int | None = None, stride: int | None = None) -> TextScore:
        """What each token of `text` costs, as the start of a document.

        Texts longer than `seq_len` (the training context by default) are scored in windows that advance by `stride` (an
        eighth of one by default).
        """
        if not isinstance(text, str):
            raise TypeError(f"a text is scored, not {type(text).__name__}: decode it first")
        seq_len = self.context_len if seq_len is None else seq_len
        codec = TextCodec(self.tokenizer, self.transform)
        tokens = codec.encode(text)
        if len(tokens) < 2:
            raise UserError("there is nothing to score: the text is empty")
        method = Method(name="sliding", seq_len=seq_len, stride=usual_stride(seq_len) if stride is None else stride)
        nats = token_nlls(self.gpt.nll, tokens, method, device=self.gpt.embed.device, batch_tokens=max(seq_len, 8192))
        return TextScore(tokens[1:], nats, codec.count_bytes(tokens))

    @torch.no_grad()
    def logits(self, text: str) -> Tensor:
        """(n + 1, vocab) float32: the prediction after the begin-of-document token and after each of the n tokens."""
        tokens = TextCodec(self.tokenizer, self.transform).encode(text)
        ids = torch.tensor([tokens.tolist()], device=self.gpt.embed.device)
        return self.gpt.logits(self.gpt(ids, rope_len=max(self.context_len, ids.shape[1])))[0]


def load(path: str | Path, device: str = "auto") -> Model:
    """The model in a packed file (`model.epigram`), in a run folder, or in a checkpoint folder.

    Raises UserError when there is none, ArtifactError when the file is damaged.
    """
    from epigram.run.weights import load_model  # it imports every part; `Model` alone does not need them

    return load_model(Path(path), device)


def silent_ids(tokenizer: Tokenizer) -> list[int]:
    """Control, unknown and unused ids: they stand for no text, so generation never chooses them."""
    return np.flatnonzero(tokenizer.byte_tables().is_edge).tolist()


def _texts(decoder: Decoder, tokens: Iterator[int]) -> Iterator[str]:
    """Valid text as soon as it is complete: a character may be spread over several byte tokens."""
    for token in tokens:
        if text := decoder.feed(token):
            yield text
    if text := decoder.finish():
        yield text


def _until(stop: Sequence[str], pieces: Iterator[str]) -> Iterator[str]:
    """`pieces` until one of `stop` appears; what could be the beginning of a stop text is held back."""
    stop = [text for text in stop if text]
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[: min(found)]
            return
        safe = len(held) - max((_overlap(held, text) for text in stop), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
