"""Small models and matrices for the tests of this folder."""

import io

import numpy as np
import torch

from epigram.artifact.codecs.base import Layout
from epigram.artifact.tensors import Contents
from epigram.quantized import QuantizedTensor


def gaussian_codes(rows: int, cols: int, qmax: int = 31, sigma: float = 4.4, spread: float = 0.3, seed: int = 0):
    """int8 codes (rows, cols) of Gaussians whose rows and columns differ in spread."""
    random = np.random.default_rng(seed)
    row, col = (np.exp(random.normal(0, spread, n)) for n in (rows, cols))
    weights = random.standard_normal((rows, cols)) * row[:, None] * col * sigma
    return np.clip(np.rint(weights), -qmax, qmax).astype(np.int8)


def quantized(rows: int, cols: int, qmax: int = 31, **options: float) -> QuantizedTensor:
    codes = torch.from_numpy(gaussian_codes(rows, cols, qmax, **options))
    return QuantizedTensor(codes, torch.linspace(0.01, 0.05, rows).half(), qmax)


def layout(name: str, codes: np.ndarray, qmax: int, scale: np.ndarray | None = None) -> Layout:
    rows, cols = codes.shape
    scale = np.full(rows, 1 / qmax, np.float16) if scale is None else scale
    return Layout(name=name, rows=rows, cols=cols, qmax=qmax, scale=scale)


def contents(tokenizer: bytes | None = None, layers: int = 2, dim: int = 24) -> Contents:
    """A model with every kind of tensor, integer and float mixed in order, an empty one and a scalar among
    them."""
    tensors: dict[str, QuantizedTensor | torch.Tensor] = {"embed": quantized(40, dim, 127, sigma=12.0)}
    generator = torch.Generator().manual_seed(5)
    for i in range(layers):
        tensors[f"layers.{i}.q"] = quantized(dim, dim, seed=10 * i)
        tensors[f"attn_scale.{i}"] = torch.randn(dim, generator=generator).half()
        tensors[f"layers.{i}.down"] = quantized(dim, 3 * dim, seed=10 * i + 1, spread=0.8)
    tensors["backout"] = torch.tensor(0.25, dtype=torch.float16)
    tensors["rope"] = torch.randn(3, 2, 5, generator=generator)
    tensors["nothing"] = torch.zeros(0, 4, dtype=torch.float16)
    return Contents(
        model={"num_layers": layers, "windows": [1, 2], "name": "ﬁne", "lr": 0.1},
        tensors=tensors,
        recipe="toy",
        tokenizer_proto=tokenizer,
        provenance={"calibration": "training windows", "seed": 7},
        cap_bytes=16_000_000,
    )


def same_tensors(left: Contents, right: Contents) -> bool:
    """Whether names, order, types and every bit agree."""
    if list(left.tensors) != list(right.tensors):
        return False
    return all(_same(left.tensors[name], right.tensors[name]) for name in left.tensors)


def _same(left: QuantizedTensor | torch.Tensor, right: QuantizedTensor | torch.Tensor) -> bool:
    if isinstance(left, QuantizedTensor) and isinstance(right, QuantizedTensor):
        return left.qmax == right.qmax and _same(left.codes, right.codes) and _same(left.scale, right.scale)
    assert isinstance(left, torch.Tensor)
    assert isinstance(right, torch.Tensor)
    return left.dtype == right.dtype and torch.equal(left, right)


def train_tokenizer(text: str, vocab_size: int = 320, **options: object) -> bytes:
    """A SentencePiece BPE model file."""
    import sentencepiece

    settings: dict[str, object] = {"model_type": "bpe", "byte_fallback": True, "minloglevel": 2} | options
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=file, vocab_size=vocab_size, **settings
    )
    return file.getvalue()
