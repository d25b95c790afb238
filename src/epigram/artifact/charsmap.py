"""A SentencePiece normaliser's character map in a tenth of the bytes.

The map says which strings are replaced by which ("ﬁ" by "fi"; 225,000 of them for nmt_nfkc). SentencePiece
keeps it as a double-array trie with shared tails (darts-clone), then the replacement texts: 240 kB, of which
brotli leaves 98 kB, because where a state landed in the array is arbitrary. Here the trie is read out as the
graph it is, states in depth-first order, and a reader lays out an array of its own. The result finds the same
replacement for every string; its bytes differ from the original's once, and are the same ever after. nmt_nfkc
takes 10 kB behind brotli.

Darts-clone's units, 32 bits: bits 0-7 the label, bit 8 "has a value", bit 9 and 10-31 the offset; a state is
known by its base (its unit's index xor the offset), its child for byte c sits at base xor c and has label c,
its value sits at the base and has bit 31.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from epigram.wire_format import WireError, join_streams, split_streams

MAX_STATES = 1 << 16  # nmt_nfkc has 18,994
MAX_EDGES = 1 << 17  # and 29,685
_BLOCK = 256
_TRIES = 8  # blocks that are searched for a place before a new one is begun
_VALUE_BIT = 1 << 31
_PLANES = 3  # bytes of a reference or of a step between characters, both below 2**24
_STREAMS = 4 + 2 * _PLANES

Units = NDArray[np.int64]


@dataclass(frozen=True)
class Graph:
    """A map as a graph of states, numbered in depth-first order from the root, 0.

    labels[s]: bytes that lead on from state s, ascending. targets[s]: the states they lead to.
    texts[s]: the replacement of the string that ends at s, or None.
    """

    labels: list[bytes]
    targets: list[list[int]]
    texts: list[str | None]


def pack(charsmap: bytes) -> bytes:
    """The compact form of a `precompiled_charsmap`; empty for an empty one. Raises WireError."""
    return _to_streams(_read(charsmap)) if charsmap else b""


def unpack(packed: bytes) -> bytes:
    """A `precompiled_charsmap` that maps like the one that was packed. Raises WireError if malformed."""
    return _lay_out(_from_streams(packed)) if packed else b""


def _read(charsmap: bytes) -> Graph:
    """Walk the double array. Raises WireError if it points outside itself or is no UTF-8."""
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size % 4 or not 4 <= size <= len(charsmap) - 4:
        raise WireError("the character map's array has an impossible length")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    walk = _Walk(units, charsmap[4 + size :])
    walk.run()
    return Graph(walk.labels, walk.targets, walk.texts)


class _Walk:
    """A depth-first walk over the states of a double array; shared states are met often, visited once."""

    def __init__(self, units: Units, texts: bytes) -> None:
        self.units, self.blob = units, texts
        self.number: dict[tuple[int, bool], int] = {}
        self.labels: list[bytes] = []
        self.targets: list[list[int]] = []
        self.texts: list[str | None] = []

    def run(self) -> None:
        stack = [self._enter(*self._state(0))]
        while stack:
            state, children = stack[-1]
            child = next(children, None)
            if child is None:
                stack.pop()
                continue
            key = self._state(child)
            if key not in self.number:
                stack.append(self._enter(*key))
            self.targets[state].append(self.number[key])

    def _state(self, index: int) -> tuple[int, bool]:
        """The state that the unit at `index` leads to: its base, and whether it has a value."""
        unit = int(self.units[index])
        return index ^ (unit >> 10 << ((unit & 512) >> 6)), bool(unit & 256)

    def _enter(self, base: int, has_value: bool) -> tuple[int, Iterator[int]]:
        state = self.number[base, has_value] = len(self.labels)
        places = base ^ np.arange(1, _BLOCK)
        inside = places[places < len(self.units)]
        children = inside[(self.units[inside] & (_VALUE_BIT | 255)) == inside ^ base]
        self.labels.append(bytes((children ^ base).tolist()))
        self.targets.append([])
        self.texts.append(self._text(base) if has_value else None)
        return state, iter(children.tolist())

    def _text(self, base: int) -> str:
        start = int(self.units[base]) & ~_VALUE_BIT if base < len(self.units) else len(self.blob)
        end = self.blob.find(b"\0", start)
        if end < 0:
            raise WireError("the character map points outside its texts")
        try:
            return self.blob[start:end].decode()
        except UnicodeDecodeError as error:
            raise WireError("the character map's texts are not UTF-8") from error


def _to_streams(graph: Graph) -> bytes:
    counts = bytes(len(labels) for labels in graph.labels)
    _check_size(counts)
    has_text = bytes(text is not None for text in graph.texts)
    texts = [text for text in graph.texts if text is not None]
    if max(map(len, texts), default=0) > 255:
        raise WireError("the character map has a replacement of more than 255 characters")
    lengths = bytes(len(text) for text in texts)
    references = _planes(_zigzag(_references(graph)))
    return join_streams(
        [counts, has_text, _label_steps(graph.labels), lengths, *references, *_planes(_text_steps(texts))]
    )


def _references(graph: Graph) -> list[int | None]:
    """One entry an edge, in the order of the walk.

    None for a state not met before, else the step from the state that was last met again.
    """
    result: list[int | None] = []
    seen, last = 1, 0
    stack = [iter(graph.targets[0])]
    while stack:
        target = next(stack[-1], None)
        if target is None:
            stack.pop()
        elif target == seen:
            result.append(None)
            seen += 1
            stack.append(iter(graph.targets[target]))
        else:
            result.append(target - last)
            last = target
    return result


def _zigzag(steps: list[int | None]) -> list[int]:
    """None to 0, small steps of either sign to small positive numbers."""
    return [0 if step is None else 2 * step + 1 if step >= 0 else -2 * step for step in steps]


def _unzigzag(value: int) -> int:
    return value >> 1 if value & 1 else -(value >> 1)


def _label_steps(labels: list[bytes]) -> bytes:
    """The first label of a state as it is, each further one as its distance from the one before, less one."""
    steps = bytearray()
    for row in labels:
        steps += bytes(b if i == 0 else b - row[i - 1] - 1 for i, b in enumerate(row))
    return bytes(steps)


def _text_steps(texts: list[str]) -> list[int]:
    """Characters as steps from the one at the same position in the latest text that had one.

    Neighbours in the trie are neighbours in Unicode, so the steps are small.
    """
    latest: list[int] = []
    steps: list[int | None] = []
    for text in texts:
        points = [ord(character) for character in text]
        latest += [0] * (len(points) - len(latest))
        steps += [point - latest[i] for i, point in enumerate(points)]
        latest[: len(points)] = points
    return _zigzag(steps)


def _planes(values: list[int]) -> list[bytes]:
    """All lowest bytes, all second bytes, all third bytes."""
    array = np.array(values, np.int64)
    assert array.max(initial=0) < 1 << 8 * _PLANES
    return [(array >> 8 * i & 255).astype(np.uint8).tobytes() for i in range(_PLANES)]


def _unplanes(planes: list[bytes]) -> list[int]:
    if len({len(plane) for plane in planes}) != 1:
        raise WireError("the character map's numbers have unequal parts")
    values = sum(np.frombuffer(plane, np.uint8).astype(np.int64) << 8 * i for i, plane in enumerate(planes))
    return values.tolist()  # type: ignore[union-attr]


def _from_streams(packed: bytes) -> Graph:
    """Rebuild the graph, every number checked. Raises WireError."""
    counts, has_text, steps, lengths, *rest = split_streams(packed, _STREAMS)
    references, characters = _unplanes(rest[:_PLANES]), _unplanes(rest[_PLANES:])
    _check_size(counts)
    if len(has_text) != len(counts) or not len(steps) == len(references) == sum(counts):
        raise WireError("the character map's parts have lengths that do not fit together")
    labels = _read_labels(counts, steps)
    texts = iter(_read_texts(lengths, characters))
    placed = [next(texts, "") if flag else None for flag in has_text]
    if sum(map(bool, has_text)) != len(lengths) or max(has_text) > 1 or has_text[0]:
        raise WireError("the character map has texts without a place")
    return Graph(labels, _read_targets(counts, references), placed)


def _check_size(counts: bytes) -> None:
    if not 0 < len(counts) <= MAX_STATES or sum(counts) > MAX_EDGES:
        raise WireError(f"a character map of {len(counts):,} states, not 1 to {MAX_STATES:,}, or too many edges")


def _read_labels(counts: bytes, steps: bytes) -> list[bytes]:
    labels, place = [], 0
    for count in counts:
        values = np.frombuffer(steps, np.uint8, count, place).astype(np.int64)
        values[1:] += 1
        values = values.cumsum()
        if count and (values[0] == 0 or values[-1] > 255):
            raise WireError("the character map has a label outside 1 to 255")
        labels.append(bytes(values.tolist()))
        place += count
    return labels


def _read_texts(lengths: bytes, steps: list[int]) -> list[str]:
    if sum(lengths) != len(steps):
        raise WireError("the character map's texts have another length than they declare")
    latest, texts, place = [0] * 256, [], 0
    for length in lengths:
        for i in range(length):
            latest[i] += _unzigzag(steps[place + i])
            if not 0 < latest[i] < 0x110000 or 0xD800 <= latest[i] < 0xE000:
                raise WireError("the character map's texts are no Unicode")
        texts.append("".join(map(chr, latest[:length])))
        place += length
    return texts


def _read_targets(counts: bytes, references: list[int]) -> list[list[int]]:
    """Follow the walk of `_references`; every state must be entered once."""
    targets: list[list[int]] = [[] for _ in counts]
    seen, last, stack = 1, 0, [0]
    edges = iter(references)
    while stack:
        state = stack[-1]
        if len(targets[state]) == counts[state]:
            stack.pop()
            continue
        value = next(edges)
        if value == 0:
            target, seen = seen, seen + 1
            stack.append(target)
        else:
            target = last = last + _unzigzag(value)
        if not 0 <= target < min(seen, len(counts)):
            raise WireError("the character map refers to a state that is not there")
        targets[state].append(target)
    if seen != len(counts):
        raise WireError("the character map has states that nothing leads to")
    return targets


def _lay_out(graph: Graph) -> bytes:
    """A double array for the graph: a base for each state, then the units."""
    bases, size = _Placement(graph).run()
    units = np.full(size, _VALUE_BIT, np.int64)  # an empty unit matches no byte
    blob, starts = bytearray(), {}
    for text in graph.texts:
        if text is not None and text not in starts:
            starts[text] = len(blob)
            blob += text.encode() + b"\0"
    flags = [256 * (text is not None) for text in graph.texts]
    units[0] = flags[0] | bases[0] << 10
    for state, base in enumerate(bases):
        text = graph.texts[state]
        if text is not None:
            units[base] = _VALUE_BIT | starts[text]
        for label, target in zip(graph.labels[state], graph.targets[state], strict=True):
            place = base ^ label
            units[place] = label | flags[target] | (place ^ bases[target]) << 10
    array = units.astype("<u4").tobytes()
    return len(array).to_bytes(4, "little") + array + bytes(blob)


class _Placement:
    """First-fit search for bases: no two states share a base, no two units share a place.

    Children of a state differ in their lowest eight bits only, so a state lives in one block of 256 units.
    States with many children go first; those with a single unit fill what is left.
    """

    def __init__(self, graph: Graph) -> None:
        self.needs = [
            (b"\0" if text is not None else b"") + labels
            for labels, text in zip(graph.labels, graph.texts, strict=True)
        ]
        self.free = np.zeros((0, _BLOCK), bool)
        self.unused_base = np.zeros((0, _BLOCK), bool)
        self.bases = [0] * len(self.needs)

    def run(self) -> tuple[list[int], int]:
        """The base of each state, and the number of units, whole blocks."""
        self._grow()
        self.free[0, 0] = self.unused_base[0, 0] = False  # the root's own unit, and no base: SentencePiece forbids it
        order = sorted(range(len(self.needs)), key=lambda state: (-len(self.needs[state]), state))
        many = [state for state in order if len(self.needs[state]) > 1]
        for state in many:
            self.bases[state] = self._place_many(np.frombuffer(self.needs[state], np.uint8).astype(np.int64))
        self._place_single([state for state in order if len(self.needs[state]) <= 1])
        assert self.free.size < 1 << 21  # so that every offset fits without the wide form
        return self.bases, self.free.size

    def _grow(self) -> None:
        block = np.ones((1, _BLOCK), bool)
        self.free = np.concatenate([self.free, block])
        self.unused_base = np.concatenate([self.unused_base, block])

    def _place_many(self, needs: Units) -> int:
        first = max(0, len(self.free) - _TRIES)
        grid = np.arange(_BLOCK)[:, None] ^ needs  # (candidate base, unit) within a block
        fits = self.free[first:][:, grid].all(axis=2) & self.unused_base[first:]
        found = np.flatnonzero(fits)
        if not len(found):
            self._grow()
            return self._place_many(needs)
        base = first * _BLOCK + int(found[0])
        self.free.reshape(-1)[base ^ needs] = False
        self.unused_base.reshape(-1)[base] = False
        return base

    def _place_single(self, states: list[int]) -> None:
        slots = iter(np.flatnonzero(self.free.reshape(-1)).tolist())
        for state in states:
            label = self.needs[state][0] if self.needs[state] else 0
            slot = next((slot for slot in slots if self.unused_base.reshape(-1)[slot ^ label]), None)
            if slot is None:
                start = self.free.size
                self._grow()
                slots = iter(range(start, start + _BLOCK))
                slot = next(slots)
            self.free.reshape(-1)[slot] = False
            self.unused_base.reshape(-1)[slot ^ label] = False
            self.bases[state] = slot ^ label
