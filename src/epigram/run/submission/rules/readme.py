"""README.md against the logs.

Any README gives the val_bpb of each seed. One of our own form is made from figures alone: its headline, its table and
its sentences with figures are written again from the logs and compared.
"""

from collections.abc import Iterator

from epigram.config import parse_config
from epigram.errors import UserError
from epigram.run.submission import readme as form
from epigram.run.submission.findings import Finding
from epigram.run.submission.measured import measured
from epigram.run.submission.record import Record

_MADE = ("Every figure is read from the logs in this folder", form.CODE_START, form.TABLE_START)
_ASKED = {  # kind of paragraph -> how it may start; the first two must be there
    "headline": (form.HEADLINE_START,),
    "table of seeds": (form.TABLE_START,),
    "bytes": (form.CODE_START,),
    "score": ("The score is `",),
    "test against a record": ("Beats the record of", "Is not shown to beat", "Against the record of"),
    "time": ("Training, calibration and quantization share",),
    "conditions": ("The prediction of a token depends on the artifact",),
}
_NEEDED = ("headline", "table of seeds")


def readme(record: Record) -> Iterator[Finding]:
    if record.readme is None:
        return
    for log in record.logs:
        if log.val_bpb is not None and not _says(record.readme, log.val_bpb):
            message = f"README.md does not give the val_bpb of {log.name}, {log.val_bpb:.4f}"
            yield Finding(rule="log.readme", message=message)
    if record.is_ours and record.json is not None and any(words in record.readme for words in _MADE):
        yield from _own(record, record.readme)


def _says(text: str, value: float) -> bool:
    """Whether a text gives a figure, with four digits or more."""
    return any(f"{value:.{digits}f}" in text for digits in range(4, 9))


def _own(record: Record, text: str) -> Iterator[Finding]:
    try:
        expected = _written_again(record)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:  # of fields that are not there, or of no use
        why = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        yield Finding(rule="log.readme", message=f"README.md cannot be compared with logs and submission.json: {why}")
        return
    theirs, ours = _paragraphs(text), _paragraphs(expected)
    for kind, starts in _ASKED.items():
        known = next((part for part in ours if part.startswith(starts)), None)
        said = [part for part in theirs if part.startswith(starts)]
        if not said and kind in _NEEDED:
            yield Finding(rule="log.readme", message=f"README.md has no {kind} of the form that epigram submit writes")
        for part in said:
            if known is None or not (part == known or (kind != "table of seeds" and part.startswith(known))):
                message = f"the {kind} of README.md is not that of the logs: {_difference(part, known)}"
                yield Finding(rule="log.readme", message=message)


def _written_again(record: Record) -> str:
    """Raises KeyError, TypeError, ValueError, AttributeError or ArithmeticError for what is missing or of no use."""
    logs = sorted(record.logs, key=lambda log: log.seed or 0)
    config = parse_config(dict(logs[0].recipe or {}), logs[0].name)
    if any(None in (log.val_bpb, log.steps, record.artifact_bytes(log), log.artifact_bytes) for log in logs):
        raise UserError("a log does not say all that the table gives")
    known = measured(record)
    figures = {**known.means(), **known.spreads(), **known.bytes()}
    found = {**(record.json or {}), **figures, "seeds": [log.seed for log in logs]}
    return form.readme(found, logs, config, {"processes": 1})


def _paragraphs(text: str) -> list[str]:
    """With one space for each gap, lines of tables apart from each other included."""
    return [" ".join(part.split()) for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]


def _difference(said: str, known: str | None) -> str:
    """From a word before the first that differs."""
    if known is None:
        return f"{said[:80]!r} belongs to nothing there"
    a, b = said.split(" "), known.split(" ")
    place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    near = slice(max(place - 2, 0), place + 3)
    return f"{' '.join(a[near])!r} for {' '.join(b[near])!r}"
