"""What is left out of a build on request: short documents, other languages, repetitions. Each is counted.

Always on, and not here: training documents with the text of a validation document (`build`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epigram.errors import UserError

DROPPED = ("empty_documents", "short_documents", "other_language", "near_duplicates")  # reasons, from 1; 0 is kept
EMPTY, SHORT, LANGUAGE, NEAR = range(1, len(DROPPED) + 1)
DEDUP = ("none", "exact", "near")
_SHINGLE_WORDS = 5
_WORDS = re.compile(r"\w+")
NEAR_THRESHOLD = 0.7
PERMUTATIONS = 128
_SIGNATURES_AT_ONCE = 1 << 13
_LOW_THRESHOLD = 0.65  # below it, bands of four would miss documents that are near
_SEED = 1
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, which spreads bits upwards
_LANGUAGE_CHARS = 2000  # of a document that are looked at: more costs time and hardly changes the answer
_RECENT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What to leave out.

    min_chars: of the normalised text of a document. language: code such as "en" of the only language to keep, ""
    for any. dedup: "exact" keeps one of equal documents, "near" leaves out training documents too that are like a
    validation document: by MinHash, a share of at least `near_threshold` (by default `NEAR_THRESHOLD`) of the
    five-word sequences of both together is in both.
    """

    min_chars: int = 0
    language: str = ""
    dedup: str = "none"
    near_threshold: float | None = None

    @property
    def threshold(self) -> float:
        """The share that is near."""
        return NEAR_THRESHOLD if self.near_threshold is None else self.near_threshold

    def problems(self) -> list[str]:
        """Settings that cannot be, in words."""
        found = []
        if self.min_chars < 0:
            found.append(f"min_chars = {self.min_chars} must not be negative")
        if self.dedup not in DEDUP:
            found.append(f"dedup = {self.dedup!r} is unknown: choose one of {', '.join(DEDUP)}")
        if not 0.3 <= self.threshold <= 1:
            found.append(f"near_threshold = {self.near_threshold} must lie between 0.3 and 1")
        if self.near_threshold is not None and self.dedup in ("none", "exact"):
            found.append(
                f"near_threshold = {self.near_threshold} is for dedup = 'near', and dedup = {self.dedup!r}: leave it "
                "out, or look for near documents"
            )
        return found


class Cleaner:
    """Decides about one document at a time; each process has its own. `near`: signatures of validation documents,
    (N, PERMUTATIONS) uint32.

    Raises UserError when a library is missing or the language is unknown to it.
    """

    def __init__(self, cleaning: Cleaning, near: NDArray[np.uint32] | None = None) -> None:
        self._cleaning = cleaning
        self._identify = _language_identifier(cleaning.language) if cleaning.language else None
        self._near = near
        self._bands = None if near is None else _Bands(near, num_bands(cleaning.threshold))

    def reason(self, text: str) -> int:
        """Why a document of normalised `text` is left out (an index into `DROPPED`, from 1), or 0."""
        if not text:
            return EMPTY
        if len(text) < self._cleaning.min_chars:
            return SHORT
        if self._identify is not None and self._identify(text[:_LANGUAGE_CHARS]) != self._cleaning.language:
            return LANGUAGE
        return 0

    def is_near(self, text: str) -> bool:
        """Whether a text is like one of the signatures."""
        if self._near is None or self._bands is None:
            return False
        own = signature(text)
        rows = self._bands.rows_like(own)
        blocks = (rows[start : start + _SIGNATURES_AT_ONCE] for start in range(0, len(rows), _SIGNATURES_AT_ONCE))
        return any((np.mean(self._near[block] == own, axis=1) >= self._cleaning.threshold).any() for block in blocks)


class _Bands:
    """Finds signatures that have a band in common with another: 8 bytes for each band of each signature.

    An entry is the hash of a band in its upper bits and the row of the signature in its lower ones, so that entries of
    equal bands lie together when all are sorted. Different bands of one hash only cost a comparison of signatures.
    """

    def __init__(self, signatures: NDArray[np.uint32], num_bands: int) -> None:
        self._num_bands = num_bands
        self._row_bits = np.uint64((1 << len(signatures).bit_length()) - 1)
        entries = np.empty((len(signatures), num_bands), np.uint64)
        for start in range(0, len(signatures), _SIGNATURES_AT_ONCE):
            hashes = _band_hashes(signatures[start : start + _SIGNATURES_AT_ONCE], num_bands)
            rows = np.arange(start, start + len(hashes), dtype=np.uint64)
            entries[start : start + len(hashes)] = hashes & ~self._row_bits | rows[:, None]
        self._entries = entries.reshape(-1)
        self._entries.sort()

    def rows_like(self, signature: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Rows of the signatures that may have a band in common with this one, in order."""
        first = _band_hashes(signature[None], self._num_bands)[0] & ~self._row_bits
        starts = np.searchsorted(self._entries, first)
        ends = np.searchsorted(self._entries, first | self._row_bits, side="right")
        found = [self._entries[starts[band] : ends[band]] for band in np.flatnonzero(starts < ends)]
        return np.unique(np.concatenate(found) & self._row_bits) if found else np.empty(0, np.uint64)


def _band_hashes(signatures: NDArray[np.uint32], num_bands: int) -> NDArray[np.uint64]:
    """A hash of each band and its number, (N, PERMUTATIONS) to (N, num_bands), whose upper bits depend on all of it."""
    bands = signatures.reshape(len(signatures), num_bands, -1)
    hashes = np.tile(np.arange(num_bands, dtype=np.uint64), (len(signatures), 1))
    for place in range(bands.shape[2]):
        hashes ^= hashes >> np.uint64(32)
        hashes ^= bands[:, :, place]
        hashes *= _ODD
    return hashes


def num_bands(threshold: float) -> int:
    """Bands of the signature, of which one in common makes a candidate: so many that of the documents at `threshold`
    one in a hundred is missed at most, 1 - (1 - threshold^rows)^bands being the chance of a candidate.
    """
    return 64 if threshold < _LOW_THRESHOLD else 32


def signature(text: str) -> NDArray[np.uint32]:
    """MinHash of the five-word sequences of a text, letter case and punctuation left aside, (PERMUTATIONS,) uint32: the
    share of places where two are equal estimates the share of common sequences."""
    words = _WORDS.findall(text.lower()) or [text]  # what has no words is like itself alone
    count = max(len(words) - _SHINGLE_WORDS + 1, 1)
    shingles = {" ".join(words[start : start + _SHINGLE_WORDS]) for start in range(count)}
    minhash = rensa().RMinHash(PERMUTATIONS, _SEED)
    minhash.update(sorted(shingles))
    return np.array(minhash.digest(), np.uint32)


def rensa() -> Any:
    """The library of MinHash; UserError when it is missing."""
    try:
        import rensa as library
    except ModuleNotFoundError as error:
        raise UserError("finding near duplicates needs the library rensa: pip install 'epigram[clean]'") from error
    return library


def _language_identifier(language: str) -> Callable[[str], str]:
    """A function from text to language code."""
    try:
        import py3langid
    except ModuleNotFoundError as error:
        raise UserError("telling languages needs the library py3langid: pip install 'epigram[clean]'") from error
    known = sorted(str(code) for code, _ in py3langid.rank("text"))
    if language not in known:
        raise UserError(f"language {language!r} is unknown: choose one of {', '.join(known)}")
    return lambda text: str(py3langid.classify(text)[0])


class HashSet:
    """64-bit numbers that were met, 8 bytes each for the most part; `met` at first."""

    def __init__(self, met: NDArray[np.uint64] | None = None) -> None:
        self._sorted = np.empty(0, np.uint64) if met is None else np.unique(met)
        self._recent: set[int] = set()

    def add_new(self, values: NDArray[np.uint64], chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the `chosen` values were not met before, (N,) bool; they are from now on."""
        met = is_member(values, self._sorted)
        new = np.zeros(len(values), np.bool_)
        for index in np.flatnonzero(chosen & ~met).tolist():
            if (value := int(values[index])) not in self._recent:
                self._recent.add(value)
                new[index] = True
        if len(self._recent) >= _RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent.clear()
        return new


def is_member(values: NDArray[np.uint64], members: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are among the sorted `members`."""
    if not len(members):
        return np.zeros(len(values), np.bool_)
    return members[np.searchsorted(members, values).clip(max=len(members) - 1)] == values
