"""The tensor table of a model file: what each tensor is, what sections that makes, and a reader's checks.

Sections: the scales of all integer matrices; the float tensors, by type; the codes, one section for each
class of matrices (all layers' "q", say); the tokenizer. Scales come first, so that a codec may use them for
the codes. The table says which sections there are and how long they get; a file whose sections are others is
refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epigram import plugin
from epigram.artifact.codecs.base import tensor_class
from epigram.artifact.container import MAX_DECLARED_BYTES, Header
from epigram.errors import ArtifactError, UserError

CODECS = "epigram.artifact.codecs"
MAX_TENSORS = 1 << 14
MAX_DIMENSIONS = 8
FLOAT_BYTES = {"float16": 2, "float32": 4}
TOKENIZER = "tokenizer"

_CONTENT_KEYS = {"recipe", "model", "provenance", "cap_bytes", "codec", "tensors"}
_ENTRY_KEYS = {"name", "format", "shape", "qmax"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the tensor table: format "int" (with qmax, 1 to 127), "float16" or "float32" (qmax 0)."""

    name: str
    format: str
    shape: tuple[int, ...]
    qmax: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_class(self) -> str:
        return tensor_class(self.name)


def check_limits(entries: Sequence[Entry]) -> None:
    """The limits that hold for writers and readers alike. Raises UserError: a model can be too large."""
    if len(entries) > MAX_TENSORS:
        raise UserError(f"the model has {len(entries):,} tensors, the format allows {MAX_TENSORS:,}")
    for entry in entries:
        if len(entry.shape) > MAX_DIMENSIONS or max(entry.size, *entry.shape, 0) > MAX_DECLARED_BYTES:
            raise UserError(f"tensor {entry.name!r} has the shape {entry.shape}: the format does not allow it")


def classes(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The integer matrices by class, classes in order of their first member."""
    result: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.format == "int":
            result.setdefault(entry.tensor_class, []).append(entry)
    return result


def code_section(name: str) -> str:
    """The section that holds the codes of class `name`."""
    return f"codes/{name}"


def is_code_section(name: str) -> bool:
    return name.startswith("codes/")


def byte_sections(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    """The sections of plain numbers that these tensors need: name, and the tensors that contribute."""
    parts = [("scales", [entry for entry in entries if entry.format == "int"])]
    parts += [(kind, [entry for entry in entries if entry.format == kind]) for kind in FLOAT_BYTES]
    return [(kind, part) for kind, part in parts if part]


def item_bytes(kind: str) -> int:
    """Size of one number in byte section `kind`."""
    return 2 if kind == "scales" else FLOAT_BYTES[kind]


def raw_bytes(kind: str, part: Sequence[Entry]) -> int:
    """Length of byte section `kind` when it is decompressed."""
    return item_bytes(kind) * sum(entry.shape[0] if kind == "scales" else entry.size for entry in part)


def raw_sections(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """The sections that these tensors need, in order: name, and length when it is decompressed."""
    sections = [(kind, raw_bytes(kind, part)) for kind, part in byte_sections(entries)]
    for name, group in classes(entries).items():
        sections.append((code_section(name), sum(entry.size for entry in group)))
    return sections


def read_table(header: Header) -> tuple[Entry, ...]:
    """The table in a header, and the sections checked against it. Raises ArtifactError."""
    contents = header.contents
    if set(contents) != _CONTENT_KEYS or not isinstance(contents["tensors"], list):
        raise ArtifactError("the header has missing or unknown entries")
    if not isinstance(contents["model"], dict) or not isinstance(contents["provenance"], dict):
        raise ArtifactError("the header's model or provenance is no table")
    cap = contents["cap_bytes"]
    if not isinstance(contents["recipe"], str) or not (cap is None or (type(cap) is int and cap > 0)):
        raise ArtifactError("the header's recipe or cap has the wrong type")
    entries = tuple(_read_entry(row) for row in contents["tensors"])
    if len({entry.name for entry in entries}) != len(entries):
        raise ArtifactError("two tensors have the same name")
    try:
        check_limits(entries)
    except UserError as error:
        raise ArtifactError(str(error)) from error
    _check_sections(header, entries)
    return entries


def _read_entry(row: Any) -> Entry:
    if not isinstance(row, dict) or set(row) != _ENTRY_KEYS:
        raise ArtifactError("a tensor's entry has missing or unknown keys")
    name, kind, shape, qmax = row["name"], row["format"], row["shape"], row["qmax"]
    if not isinstance(name, str) or not isinstance(shape, list) or not isinstance(kind, str):
        raise ArtifactError("a tensor's name, format or shape has the wrong type")
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n <= MAX_DECLARED_BYTES for n in shape):
        raise ArtifactError(f"tensor {name!r} has an impossible shape")
    integer = kind == "int" and len(shape) == 2 and type(qmax) is int and 1 <= qmax <= 127
    if not integer and not (kind in FLOAT_BYTES and type(qmax) is int and qmax == 0):
        raise ArtifactError(f"tensor {name!r} has an unknown format")
    return Entry(name=name, format=kind, shape=tuple(shape), qmax=qmax)


def _check_sections(header: Header, entries: Sequence[Entry]) -> None:
    """The sections that the tensors need, in order, of the right length and codec, and maybe a tokenizer."""
    codec = header.contents["codec"]
    if not isinstance(codec, str) or codec not in plugin.names(CODECS):
        raise ArtifactError(f"the file needs the codec {codec!r}, which this release does not have: update it")
    sections = header.sections
    if sections and sections[-1].name == TOKENIZER:
        sections = sections[:-1]
    if [(section.name, section.raw) for section in sections] != raw_sections(entries):
        raise ArtifactError("the sections do not fit the tensors")
    bytes_codec = plugin.load(CODECS, codec).BYTES
    for section in header.sections:
        if section.codec != (codec if is_code_section(section.name) else bytes_codec):
            raise ArtifactError(f"section {section.name!r} has a codec that does not belong: {section.codec!r}")
