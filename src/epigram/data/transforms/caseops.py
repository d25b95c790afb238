"""CaseOps: capital letters as operators in front of small ones, so that `The`, `the` and `THE` share their pieces.

Over each maximal run of ASCII letters: a run in small letters stays; one of at least two capitals becomes ALLCAPS and
the small letters; one with an initial capital alone becomes TITLE and the small letters; any other gets TITLE where it
begins with a capital and CAPNEXT before every later capital. A mark that is in the text itself is escaped. Source:
parameter-golf #1729. Text is normalised before, so the two never meet.
"""

import re

import numpy as np
from numpy.typing import NDArray

TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"
MARKS = TITLE + ALLCAPS + CAPNEXT + ESCAPE

# A run is looked at from its beginning alone: from each of its letters, a long one in small letters (a genome, an
# encoded file) would take quadratic time.
_CAPITALS = re.compile(f"[{MARKS}]|(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*")
_LATER = re.compile("[A-Z]")
_MARKED = re.compile(f"{ESCAPE}(.)|{ALLCAPS}([a-z]+)|[{TITLE}{CAPNEXT}]([a-z])", re.DOTALL)
_SILENT = re.compile(b"\xee\x80\x84(?:\xee\x80[\x81-\x84])?|\xee\x80[\x81-\x83]")
_MARK_BYTES = 3


def encode(text: str) -> str:
    """`text` with marks for its capitals."""
    return _CAPITALS.sub(_mark, text)


def _mark(match: re.Match[str]) -> str:
    run = match[0]
    if run in MARKS:
        return ESCAPE + run
    if len(run) > 1 and run.isupper():
        return ALLCAPS + run.lower()
    first = TITLE + run[0].lower() if run[0].isupper() else run[0]
    return first + _LATER.sub(lambda capital: CAPNEXT + capital[0].lower(), run[1:])


def decode(text: str) -> str:
    """The text that `encode` was given. Marks without what they need, as at the end of a cut text, stay."""
    return _MARKED.sub(lambda match: match[1] or (match[2] or match[3]).upper(), text)


class Decoder:
    """`decode` for text that comes in pieces, as a model writes it."""

    def __init__(self) -> None:
        self._open = ""  # the mark that waits for what it acts on
        self._in_capitals = False  # behind ALLCAPS and a letter

    def feed(self, text: str) -> str:
        """The text that is certain by now; a mark at the end is held back."""
        return "".join(map(self._next, text))

    def finish(self) -> str:
        """The mark that waits in vain, if there is one."""
        rest, self._open, self._in_capitals = self._open, "", False
        return rest

    def _next(self, character: str) -> str:
        if self._open == ESCAPE:
            self._open = ""
            return character
        is_small = "a" <= character <= "z"
        if self._in_capitals and is_small:
            return character.upper()
        if self._open and is_small:
            self._in_capitals, self._open = self._open == ALLCAPS, ""
            return character.upper()
        vain = self.finish()
        if character in MARKS:
            self._open, character = character, ""
        return vain + character


def silent(text: bytes) -> NDArray[np.bool_]:
    """True for the bytes of marks, escaped ones excepted."""
    found = np.zeros(len(text), np.bool_)
    for match in _SILENT.finditer(text):
        found[match.start() : match.start() + _MARK_BYTES] = True
    return found
