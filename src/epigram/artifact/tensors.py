"""A model on its way to the disk and back: `save`, `load`, and `inspect` for the header alone."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epigram import plugin
from epigram.artifact import tokenizer_section
from epigram.artifact.codecs.base import Bytes, Codes, Encoded, Layout, order0_bits
from epigram.artifact.container import Reader, Section, checksum, describe_section, write
from epigram.artifact.report import Inspection, SizeReport, TensorSize
from epigram.artifact.table import (
    CODECS,
    TOKENIZER,
    Entry,
    byte_sections,
    check_limits,
    classes,
    code_section,
    item_bytes,
    read_table,
)
from epigram.errors import ArtifactError
from epigram.progress import Progress
from epigram.quantized import QuantizedTensor

_FLOAT_NAMES = {torch.float16: "float16", torch.float32: "float32"}

Tensors = Mapping[str, QuantizedTensor | Tensor]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A model as it ships.

    model: the model's configuration, plain JSON values. tensors: in order; a QuantizedTensor, or a float16 or
    float32 tensor. tokenizer_proto: a SentencePiece model file, or None. provenance: where weights and
    calibration data came from, plain JSON values. cap_bytes: the cap that the run was made for, if any.
    """

    model: dict[str, Any]
    tensors: dict[str, QuantizedTensor | Tensor]
    recipe: str = ""
    tokenizer_proto: bytes | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    cap_bytes: int | None = None


def save(path: Path | str, contents: Contents, codec: str = "entropy") -> SizeReport:
    """Write a model file, whole or not at all, and say where its bytes are.

    codec: a file of the folder `codecs`. Raises UserError for an unknown codec, a folder that cannot be
    written, or a model beyond the format's limits.
    """
    entries = tuple(_describe(name, tensor) for name, tensor in contents.tensors.items())
    check_limits(entries)
    packer = _Packer(codec)
    for kind, part in byte_sections(entries):
        packer.add_bytes(kind, item_bytes(kind), _join(contents.tensors, part))
    with _progress("packing", entries, True) as progress:
        for name, group in classes(entries).items():
            packer.add_codes(name, [_matrix(entry, contents.tensors) for entry in group])
            progress.advance(sum(entry.size for entry in group))
    if contents.tokenizer_proto is not None:
        packer.add_bytes(TOKENIZER, 1, tokenizer_section.compact(contents.tokenizer_proto))
    total = write(Path(path), packer.sections, _header_contents(contents, codec, entries), packer.blobs)
    return packer.report(total, entries)


def load(path: Path | str, *, shown: bool = True) -> Contents:
    """Read a model file. Raises ArtifactError, which says what is wrong, if `save` did not write it.

    shown: the progress; see `epigram.progress`.
    """
    with _named(path), Reader(Path(path)) as reader:
        return _load(reader, shown)


def inspect(path: Path | str) -> Inspection:
    """Read and check a file's header, decompressing nothing else. Raises ArtifactError."""
    with _named(path), Reader(Path(path)) as reader:
        header = reader.header
        report = SizeReport(header_bytes=header.header_bytes, sections=header.sections, entries=read_table(header))
        return Inspection(contents=header.contents, report=report)


@contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Put the file's name in front of what is wrong with it."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _progress(description: str, entries: Sequence[Entry], shown: bool) -> Progress:
    total = sum(entry.size for entry in entries if entry.format == "int")
    return Progress(description, total, "weights", shown=shown)


def _describe(name: str, tensor: QuantizedTensor | Tensor) -> Entry:
    if isinstance(tensor, QuantizedTensor):
        return Entry(name=name, format="int", shape=tuple(tensor.shape), qmax=tensor.qmax)
    assert tensor.dtype in _FLOAT_NAMES, f"{name} has type {tensor.dtype}; store float16, float32 or integers"
    return Entry(name=name, format=_FLOAT_NAMES[tensor.dtype], shape=tuple(tensor.shape), qmax=0)


def _join(tensors: Tensors, part: Sequence[Entry]) -> bytes:
    """The numbers of a byte section: scales of integer matrices, values of float tensors, in order."""
    pieces = []
    for entry in part:
        tensor = tensors[entry.name]
        values = tensor.scale if isinstance(tensor, QuantizedTensor) else tensor
        pieces.append(_to_numpy(values).tobytes())
    return b"".join(pieces)


def _matrix(entry: Entry, tensors: Tensors) -> tuple[Layout, Codes]:
    tensor = tensors[entry.name]
    assert isinstance(tensor, QuantizedTensor)
    codes = _to_numpy(tensor.codes)
    assert 1 <= entry.qmax <= 127, f"{entry.name} has qmax {entry.qmax}"
    assert _within(codes, entry.qmax), f"{entry.name} has codes beyond {entry.qmax}"
    return _layout(entry, tensor.scale), codes


def _layout(entry: Entry, scale: Tensor) -> Layout:
    rows, cols = entry.shape
    return Layout(name=entry.name, rows=rows, cols=cols, qmax=entry.qmax, scale=_to_numpy(scale))


def _to_numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


def _within(codes: Codes, qmax: int) -> bool:
    return not codes.size or (int(codes.min()) >= -qmax and int(codes.max()) <= qmax)


def _header_contents(contents: Contents, codec: str, entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "recipe": contents.recipe,
        "model": contents.model,
        "provenance": contents.provenance,
        "cap_bytes": contents.cap_bytes,
        "codec": codec,
        "tensors": [vars(entry) for entry in entries],
    }


class _Packer:
    """Collects the sections of a file that is being written."""

    def __init__(self, codec: str) -> None:
        self._codec = codec
        module = plugin.load(CODECS, codec)
        self._bytes_codec: str = module.BYTES
        self._bytes_module = plugin.load(CODECS, module.BYTES)
        self._encoder = module.new_encoder()
        self.sections: list[Section] = []
        self.blobs: list[bytes] = []
        self._encoded: list[Encoded] = []
        self._bits: dict[str, tuple[float, float]] = {}  # by matrix: its bits, and at order 0

    def add_bytes(self, name: str, item_size: int, data: bytes) -> None:
        stored = self._bytes_module.pack(data, item_size)
        self.sections.append(describe_section(name, self._bytes_codec, stored, data))
        self.blobs.append(stored)

    def add_codes(self, name: str, matrices: Sequence[tuple[Layout, Codes]]) -> None:
        encoded: Encoded = self._encoder.encode(matrices)
        raw = [codes.data for _, codes in matrices]
        self.sections.append(describe_section(code_section(name), self._codec, encoded.stored, *raw))
        self.blobs.append(encoded.stored)
        self._encoded.append(encoded)
        for (layout, codes), bits in zip(matrices, encoded.matrix_bits, strict=True):
            self._bits[layout.name] = bits, order0_bits(codes)

    def report(self, total_bytes: int, entries: tuple[Entry, ...]) -> SizeReport:
        known = [encoded.model_bits for encoded in self._encoded if encoded.model_bits is not None]
        return SizeReport(
            header_bytes=total_bytes - sum(section.stored for section in self.sections),
            sections=tuple(self.sections),
            entries=entries,
            tensors=tuple(self._tensor_size(entry) for entry in entries),
            model_bits=sum(known) if len(known) == len(self._encoded) else None,
        )

    def _tensor_size(self, entry: Entry) -> TensorSize:
        rates = {section.name: section.stored / max(section.raw, 1) for section in self.sections}
        if entry.format != "int":
            stored = entry.size * item_bytes(entry.format) * rates[entry.format]
            return TensorSize(entry=entry, stored_bytes=stored, order0_bits=None)
        bits, order0 = self._bits[entry.name]
        scales = entry.shape[0] * item_bytes("scales") * rates["scales"]
        return TensorSize(entry=entry, stored_bytes=bits / 8 + scales, order0_bits=order0)


def _load(reader: Reader, shown: bool) -> Contents:
    entries = read_table(reader.header)
    contents = reader.header.contents
    unpacker = _Unpacker(reader, plugin.load(CODECS, contents["codec"]))
    floats: dict[str, Tensor] = {}  # values of float tensors, scales of integer matrices
    for kind, part in byte_sections(entries):
        floats |= _split(unpacker.read_bytes(item_bytes(kind)), kind, part)
    codes: dict[str, Tensor] = {}
    with _progress("unpacking", entries, shown) as progress:
        for group in classes(entries).values():
            codes |= unpacker.read_codes([_layout(entry, floats[entry.name]) for entry in group])
            progress.advance(sum(entry.size for entry in group))
    proto = None
    if not unpacker.at_end:
        proto = tokenizer_section.expand(unpacker.read_bytes(1).tobytes())
    return Contents(
        model=contents["model"],
        tensors={entry.name: _assemble(entry, floats, codes) for entry in entries},
        recipe=contents["recipe"],
        tokenizer_proto=proto,
        provenance=contents["provenance"],
        cap_bytes=contents["cap_bytes"],
    )


def _assemble(entry: Entry, floats: dict[str, Tensor], codes: dict[str, Tensor]) -> QuantizedTensor | Tensor:
    if entry.format == "int":
        return QuantizedTensor(codes[entry.name], floats[entry.name], entry.qmax)
    return floats[entry.name]


def _split(data: Bytes, kind: str, part: Sequence[Entry]) -> dict[str, Tensor]:
    """The tensors (or the scales, by the name of their matrix) in a byte section, as views.

    Raises ArtifactError for numbers that are not finite, and for scales that are not positive.
    """
    least, dtype = (0, "float16") if kind == "scales" else (-np.inf, kind)
    values = data.view(dtype)
    if not ((values > least) & (values < np.inf)).all():
        raise ArtifactError(f"section {kind!r} has numbers out of range")
    flat, start, result = torch.from_numpy(values), 0, {}
    for entry in part:
        shape = entry.shape[:1] if kind == "scales" else entry.shape
        stop = start + math.prod(shape)
        result[entry.name] = flat[start:stop].reshape(shape)
        start = stop
    return result


class _Unpacker:
    """Reads the sections of a file one after the other, each checked before and after decoding."""

    def __init__(self, reader: Reader, codec: ModuleType) -> None:
        self._reader = reader
        self._bytes_module = plugin.load(CODECS, codec.BYTES)
        self._decoder = codec.new_decoder()
        self._next = 0

    @property
    def at_end(self) -> bool:
        return self._next == len(self._reader.header.sections)

    def read_bytes(self, item_size: int) -> Bytes:
        stored = self._reader.stored(self._next)
        section = self._reader.header.sections[self._next]
        data: Bytes = self._bytes_module.unpack(stored, section.raw, item_size)
        self._finish(section, [data])
        return data

    def read_codes(self, layouts: Sequence[Layout]) -> dict[str, Tensor]:
        """The codes of the next class, by the name of the matrix."""
        matrices = self._decoder.decode(self._reader.stored(self._next), layouts)
        for layout, codes in zip(layouts, matrices, strict=True):
            if not _within(codes, layout.qmax):
                raise ArtifactError(f"tensor {layout.name!r} has codes beyond {layout.qmax}")
        self._finish(self._reader.header.sections[self._next], matrices)
        return {layout.name: torch.from_numpy(codes) for layout, codes in zip(layouts, matrices, strict=True)}

    def _finish(self, section: Section, raw: Sequence[np.ndarray]) -> None:
        if checksum(*(part.data for part in raw)).hex() != section.raw_sum:
            raise ArtifactError(
                f"section {section.name!r} does not decode to what was saved: the file was altered, or a "
                "library that decodes it has changed"
            )
        self._next += 1
