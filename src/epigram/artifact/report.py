"""Where the bytes of a model file are."""

from dataclasses import dataclass
from typing import Any

from epigram.artifact.container import Section
from epigram.artifact.table import Entry, byte_sections, classes, code_section, is_code_section


@dataclass(frozen=True, kw_only=True)
class TensorSize:
    """Bytes of one tensor.

    Codes share a stream with their class, scales and floats one with each other; this is the tensor's share,
    by information content for codes and by length for the rest.
    order0_bits: what an ideal fixed table would need for the codes; None for floats.
    """

    entry: Entry
    stored_bytes: float
    order0_bits: float | None


@dataclass(frozen=True, kw_only=True)
class ClassSize:
    """A class of integer matrices: how many, of how many codes, and the stored bytes of the codes alone."""

    num_tensors: int
    num_codes: int
    stored_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.num_codes if self.num_codes else 0.0


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Sizes of a file, in bytes where not said otherwise.

    tensors, model_bits: known when the file has just been saved, not from an inspection. model_bits: entropy
    of all codes under the codec's own model; None for a codec without one.
    """

    header_bytes: int
    sections: tuple[Section, ...]
    entries: tuple[Entry, ...]
    tensors: tuple[TensorSize, ...] = ()
    model_bits: float | None = None

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + sum(section.stored for section in self.sections)

    @property
    def num_codes(self) -> int:
        return sum(entry.size for entry in self.entries if entry.format == "int")

    @property
    def code_bytes(self) -> int:
        """Of all codes, without scales."""
        return sum(section.stored for section in self.sections if is_code_section(section.name))

    @property
    def bits_per_weight(self) -> float:
        """Of the integer matrices, without scales; 0 if there are none."""
        return 8 * self.code_bytes / self.num_codes if self.num_codes else 0.0

    @property
    def over_model(self) -> float | None:
        """How far the stored codes are above the entropy of the codec's own model, as a fraction of it."""
        return 8 * self.code_bytes / self.model_bits - 1 if self.model_bits else None

    def by_class(self) -> dict[str, ClassSize]:
        """The classes of integer matrices, in the file's order."""
        stored = {section.name: section.stored for section in self.sections}
        return {
            name: ClassSize(
                num_tensors=len(group),
                num_codes=sum(entry.size for entry in group),
                stored_bytes=stored[code_section(name)],
            )
            for name, group in classes(self.entries).items()
        }

    def rows(self) -> list[dict[str, Any]]:
        """One line a section and one for the header, as plain values: part, codec, bytes, weights,
        bits_per_weight.

        A class of matrices is called by what follows its layer number. Scales belong to the matrices'
        weights, the tokenizer and the header to none (0 weights, 0 bits).
        """
        weights = {code_section(name): size.num_codes for name, size in self.by_class().items()}
        weights |= {kind: sum(entry.size for entry in part) for kind, part in byte_sections(self.entries)}
        lines = [(_part(section.name), section.codec, section.stored, section.name) for section in self.sections]
        lines.append(("header", "zlib", self.header_bytes, ""))
        return [
            {
                "part": part,
                "codec": codec,
                "bytes": size,
                "weights": weights.get(name, 0),
                "bits_per_weight": 8 * size / weights[name] if weights.get(name) else 0.0,
            }
            for part, codec, size, name in lines
        ]


def _part(section: str) -> str:
    return section.rsplit("/", 1)[-1].rsplit("#.", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A file's header: all that is known without decompressing a weight.

    contents: "recipe", "model", "provenance", "cap_bytes", "codec", "tensors".
    """

    contents: dict[str, Any]
    report: SizeReport
