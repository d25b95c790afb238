"""The file format `.epigram`: a checked header and checked sections, nothing executed, nothing trusted.

Layout, little-endian, no gaps:

    8 bytes   magic "EPIGRAM\\0"
    u16 u16   version 1, zero
    u32 u32   length of the header as stored (zlib) and as JSON
    16 bytes  checksum of the 20 bytes above and the stored header
    ...       the header: {"sections": [...], "contents": {...}}; a section's entry has its name, its codec,
              and length and checksum, both as stored and raw
    ...       the sections, in the header's order; the file ends where the last one ends

A checksum is the first 16 bytes of a SHA-256. It finds accidents; against intent there are the limits below:
every length is checked before it is used, decompression stops at the declared length, and what a file
declares in total is checked before anything of that size is allocated. A section's codec is a name that the
reader looks up among its own; this file knows no codec. The design follows safetensors (a bounded JSON
header, no holes) and its attack collection.
"""

import hashlib
import json
import math
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from epigram.errors import ArtifactError, UserError

MAGIC = b"EPIGRAM\0"
VERSION = 1
MAX_HEADER_BYTES = 1 << 20  # as JSON; a model of a hundred tensors needs about 10 kB
MAX_SECTIONS = 4096
MAX_DECLARED_BYTES = 1 << 28  # all sections together, decompressed; seventeen times what fits under the cap

Buffer = bytes | memoryview

_PREFIX = struct.Struct("<8sHHII")
_CHECKSUM_BYTES = 16
_SECTION_KEYS = {"name", "codec", "stored", "raw", "stored_sum", "raw_sum"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One entry of the section table: sizes in bytes, checksums in hexadecimal."""

    name: str
    codec: str
    stored: int
    raw: int
    stored_sum: str
    raw_sum: str


@dataclass(frozen=True)
class Header:
    """A file's header, checked: its sections, the free-form contents, and where the sections begin."""

    sections: tuple[Section, ...]
    contents: dict[str, Any]
    header_bytes: int  # prefix, checksum and stored header

    @property
    def file_bytes(self) -> int:
        return self.header_bytes + sum(section.stored for section in self.sections)


def checksum(*parts: Buffer) -> bytes:
    """The first 16 bytes of the SHA-256 of the parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:_CHECKSUM_BYTES]


def describe_section(name: str, codec: str, stored: bytes, *raw: Buffer) -> Section:
    """The table entry of a section that decodes from `stored` to the parts `raw`, one after the other."""
    return Section(
        name=name,
        codec=codec,
        stored=len(stored),
        raw=sum(memoryview(part).nbytes for part in raw),
        stored_sum=checksum(stored).hex(),
        raw_sum=checksum(*raw).hex(),
    )


def pack_header(sections: Sequence[Section], contents: dict[str, Any]) -> bytes:
    """The bytes of a file up to its first section; `contents` must be plain JSON values, numbers finite.

    Raises UserError for a model that is larger than the format allows.
    """
    if len(sections) > MAX_SECTIONS:
        raise UserError(f"the file would have {len(sections):,} sections, the format allows {MAX_SECTIONS:,}")
    check_declared(sum(section.raw for section in sections), UserError)
    table = {"sections": [vars(section) for section in sections], "contents": contents}
    text = json.dumps(table, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise UserError(f"the header would take {len(text):,} bytes, the format allows {MAX_HEADER_BYTES:,}")
    stored = zlib.compress(text, 9)
    prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(stored), len(text))
    return prefix + checksum(prefix, stored) + stored


def write(path: Path, sections: Sequence[Section], contents: dict[str, Any], blobs: Sequence[bytes]) -> int:
    """Write the file whole or not at all; returns its size in bytes.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and then renamed. Raises
    UserError when the folder cannot be written or the disk is full.
    """
    header = pack_header(sections, contents)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            for part in (header, *blobs):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise UserError(f"cannot write {path}: {error.strerror}; nothing was left behind") from error
    except BaseException:
        _remove(temporary)
        raise
    return len(header) + sum(len(blob) for blob in blobs)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


class Reader:
    """An open file whose header has been checked; a context manager.

    Raises ArtifactError, without the file's name, for anything that is not a whole, unaltered file of this
    version.
    """

    def __init__(self, path: Path) -> None:
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep us waiting
                raise ArtifactError("this is no file: give the path of a .epigram file")
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise ArtifactError(f"cannot be read ({error.strerror}): give the path of a .epigram file") from error
        try:
            self.header = read_header(self._file)
            self._check_size()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _check_size(self) -> None:
        size, declared = os.fstat(self._file.fileno()).st_size, self.header.file_bytes
        if size != declared:
            raise ArtifactError(
                f"the file has {size:,} bytes, its header declares {declared:,}; it is truncated or has something "
                "appended: copy it again"
            )

    def stored(self, index: int) -> bytes:
        """The stored bytes of section `index`, their checksum verified."""
        before, section = self.header.sections[:index], self.header.sections[index]
        offset = self.header.header_bytes + sum(other.stored for other in before)
        data = _read(self._file, section.stored, offset)
        if len(data) != section.stored or checksum(data).hex() != section.stored_sum:
            raise ArtifactError(f"section {section.name!r} is altered or truncated: copy the file again")
        return data


def _read(file: BinaryIO, length: int, offset: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(length)
    except OSError as error:
        raise ArtifactError(f"cannot be read ({error.strerror})") from error


def read_header(file: BinaryIO) -> Header:
    """Read and check everything before the first section. Raises ArtifactError."""
    prefix = _read(file, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise ArtifactError("this is no .epigram file")
    _, version, zero, stored_length, raw_length = _PREFIX.unpack(prefix)
    if version != VERSION or zero != 0:
        raise ArtifactError(f"the file has format version {version}, this release reads version {VERSION}: update it")
    if raw_length > MAX_HEADER_BYTES or stored_length > MAX_HEADER_BYTES:
        raise ArtifactError(f"the header declares {raw_length:,} bytes, the format allows {MAX_HEADER_BYTES:,}")
    total = _read(file, _CHECKSUM_BYTES, _PREFIX.size)
    stored = _read(file, stored_length, _PREFIX.size + _CHECKSUM_BYTES)
    if len(stored) != stored_length or checksum(prefix, stored) != total:
        raise ArtifactError("the header is altered or truncated: copy the file again")
    table = _parse(_inflate(stored, raw_length))
    header_bytes = _PREFIX.size + _CHECKSUM_BYTES + stored_length
    return Header(_sections(table["sections"]), table["contents"], header_bytes)


def _inflate(stored: bytes, raw_length: int) -> bytes:
    """Decompress the header, never producing more than one byte over its declared length."""
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(stored, raw_length + 1)
    except zlib.error as error:
        raise ArtifactError("the header cannot be decompressed") from error
    if len(text) != raw_length or not inflater.eof or inflater.unused_data:
        raise ArtifactError("the header has another length than it declares")
    return text


def _parse(text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: not UTF-8, no JSON, a key twice, too many digits
        raise ArtifactError("the header is no well-formed JSON") from error
    if not isinstance(table, dict) or set(table) != {"sections", "contents"}:
        raise ArtifactError("the header needs exactly the entries 'sections' and 'contents'")
    if not isinstance(table["sections"], list) or not isinstance(table["contents"], dict):
        raise ArtifactError("the header's entries 'sections' and 'contents' have the wrong type")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


def _sections(rows: list[Any]) -> tuple[Section, ...]:
    if len(rows) > MAX_SECTIONS:
        raise ArtifactError(f"the header lists {len(rows):,} sections, the format allows {MAX_SECTIONS:,}")
    sections = tuple(_section(row) for row in rows)
    if len({section.name for section in sections}) != len(sections):
        raise ArtifactError("two sections have the same name")
    check_declared(sum(section.raw for section in sections), ArtifactError)
    return sections


def check_declared(declared: int, kind: type[UserError]) -> None:
    """Raise an error of `kind` for a model whose sections have more bytes decompressed than the format allows."""
    if declared > MAX_DECLARED_BYTES:
        raise kind(f"the model has {declared:,} bytes decompressed, the format allows {MAX_DECLARED_BYTES:,}")


def _section(row: Any) -> Section:
    if not isinstance(row, dict) or set(row) != _SECTION_KEYS:
        raise ArtifactError("a section's entry has missing or unknown keys")
    if not all(isinstance(row[key], str) for key in ("name", "codec", "stored_sum", "raw_sum")):
        raise ArtifactError("a section's name, codec and checksums must be text")
    for key in ("stored", "raw"):
        if type(row[key]) is not int or row[key] < 0:
            raise ArtifactError(f"section {row['name']!r} declares an impossible length")
    return Section(**row)
