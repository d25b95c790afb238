"""From files to pieces of work: stretches of text in a fixed order, each with the place behind it to go on from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from epigram.data.gather import SourceFile
from epigram.data.sources import base
from epigram.data.sources.base import Labelled, Part, TextPart

PART_BYTES = 1 << 20  # of text, that a worker is given at once
PART_DOCUMENTS = 4096
Place = tuple[int, int]  # a file, and in it a part or (where a file has no parts) a document
START: Place = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A part of the files to encode.

    split: of its files. documents: how many are of which file; None for one file whose documents nobody has counted.
    file: the last one. after: the place behind it.
    """

    part: Part
    split: str
    documents: tuple[tuple[int, int], ...] | None
    after: Place

    @property
    def file(self) -> int:
        """The file that the part ends in."""
        return self.after[0]


def works(
    files: Sequence[SourceFile],
    splits: Sequence[str],
    field: str,
    start: Place = START,
    local: Callable[[SourceFile], Path] = lambda file: file.path,
) -> Iterator[Work]:
    """All text of the files of some splits from `start` on; the same pieces whoever works on them.

    local: where a file can be read, asked when its turn comes.
    """
    collected = _Collected()
    for index, file in enumerate(files):
        if index < start[0] or file.split not in splits:
            continue
        skip = start[1] if index == start[0] else 0
        source = base.load(file.kind)
        if collected.split not in (None, file.split) or hasattr(source, "parts"):
            yield from collected.take()
        if hasattr(source, "parts"):
            for item, part in enumerate(source.parts(local(file), field)):
                if item >= skip:
                    yield Work(part=part, split=file.split, documents=None, after=(index, item + 1))
            continue
        for item, text in enumerate(file.documents(field)):
            if item >= skip:
                collected.add((f"{file.path}, document {item + 1:,}", text), file.split, (index, item + 1))
                if collected.is_full():
                    yield from collected.take()
    yield from collected.take()


class _Collected:
    """Documents of files that have no parts, put together until they are a good piece of work."""

    def __init__(self) -> None:
        self.split: str | None = None
        self._empty()

    def _empty(self) -> None:
        self._texts: list[Labelled] = []
        self._counts: dict[int, int] = {}
        self._bytes = 0

    def add(self, document: Labelled, split: str, after: Place) -> None:
        self._texts.append(document)
        self._counts[after[0]] = self._counts.get(after[0], 0) + 1
        self._bytes += len(document[1].encode("utf-8"))
        self.split, self._after = split, after

    def is_full(self) -> bool:
        return self._bytes >= PART_BYTES or len(self._texts) >= PART_DOCUMENTS

    def take(self) -> Iterator[Work]:
        if self._texts:
            assert self.split is not None
            part = TextPart(tuple(self._texts), self._bytes)
            yield Work(part=part, split=self.split, documents=tuple(self._counts.items()), after=self._after)
        self._empty()
        self.split = None
