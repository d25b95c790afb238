"""What the logs and the artifacts say of the runs: each by itself, and against each other."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from epigram.artifact import tensors
from epigram.config import parse_config, to_tree
from epigram.data.files import sha256_of
from epigram.errors import UserError
from epigram.quant.calibrate import CalibrationSource
from epigram.run.submission.findings import Finding
from epigram.run.submission.logs import LogFacts
from epigram.run.submission.record import Record
from epigram.run.submission.rules.limits import Limits
from epigram.typed import differing

_MOST_ODD = 5  # of a log that are listed
_FEW_LOSSES = 4  # may be alike by chance, with few digits


def runs(record: Record) -> Iterator[Finding]:
    """Logs that cannot be of the runs that they are said to be of."""
    for log in record.logs:
        if log.odd:
            more = f" and {len(log.odd) - _MOST_ODD} more" if len(log.odd) > _MOST_ODD else ""
            message = f"{log.name} says what cannot be: {', '.join(log.odd[:_MOST_ODD])}{more}"
            yield Finding(rule="log.figure", message=message)
        if log.said_seeds - {log.seed}:
            message = f"{log.name} is of seed {', '.join(map(str, sorted(log.said_seeds)))} by what it says"
            yield Finding(rule="log.seed", message=message)
    yield from _copies(record)
    yield from _recipes(record)


def _copies(record: Record) -> Iterator[Finding]:
    """The same run twice: by its seed, its artifact, its losses, or its scores where they have enough digits."""
    same: dict[tuple[str, Hashable], list[str]] = defaultdict(list)
    for log in record.logs:
        same["seed", log.seed].append(log.name)
        if log.sha256 is not None:
            same["artifact by its SHA-256", log.sha256].append(log.name)
        if len(log.losses) > _FEW_LOSSES:
            same["training losses", log.losses].append(log.name)
        if any(round(nats, 6) != nats for nats, _ in log.scores.values()):
            same["final scores", tuple(log.scores.items())].append(log.name)
    for path in record.artifacts.values():
        same["bytes", sha256_of(path)].append(path.name)
    for (what, value), names in same.items():
        if len(names) > 1 and value is not None:
            yield Finding(rule="log.copied", message=f"{' and '.join(names)} have the same {what}")


def _recipes(record: Record) -> Iterator[Finding]:
    """One recipe for all; in a folder that `epigram submit` wrote every log says which."""
    first = next((log for log in record.logs if log.recipe is not None), None)
    for log in record.logs:
        if log.recipe is None:
            if log.is_ours and (first is not None or record.has_our_script):
                yield Finding(rule="log.recipe", message=f"{log.name} says no recipe that can be read")
        elif first is not None and (keys := unlike(first.recipe or {}, log.recipe)):
            message = f"{log.name} is of another recipe than {first.name}, in {', '.join(keys)}"
            yield Finding(rule="log.recipe", message=message)


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings in which two recipes differ; the seed, and the bytes of code that a run expected, may.

    Settings that one of them leaves out are those of this release where both can be read by it.
    """
    with suppress(UserError):  # of another release
        a, b = (to_tree(parse_config(dict(tree))) for tree in (a, b))
    return [name for name in differing(a, b) if name not in ("seed", "artifact.code_bytes")]


def adaptation(record: Record) -> Iterator[Finding]:
    """Whether the score is that of a model which learned meanwhile, and what it has without."""
    for log in record.logs:
        if log.adapted is None:
            continue
        if log.unadapted is None or log.val_bpb is None:
            yield Finding(rule="score.unadapted", message=f"{log.name} gives the score of an adapted model alone")
            continue
        plain, own = log.unadapted[1], log.val_bpb
        words = f"{log.name}: {own:.6f} bits per byte while the model learns ({log.adapted}), {plain:.6f} without"
        yield Finding(rule="score.adapted", message=words)


def times(record: Record, limits: Limits) -> Iterator[Finding]:
    """Training with calibration, and scoring, within their limits."""
    for log in record.logs:
        for what, spent_s, limit_s in (("train", log.spent_s, limits.train_s), ("score", log.score_s, limits.score_s)):
            if spent_s is None:
                yield Finding(rule="time.unknown", message=f"{log.name} does not say how long it took to {what}")
            elif not spent_s <= limit_s:
                yield Finding(rule=f"time.{what}", message=f"{log.name}: {spent_s:.1f} s of {limit_s:g} s to {what}")


def calibration(record: Record) -> Iterator[Finding]:
    """What the quantizer saw: by the log, by the artifact's header, and by submission.json."""
    for log in record.logs:
        kind, split = log.calibration.get("kind"), log.calibration.get("split", "")
        if kind is None:
            yield Finding(rule="calibration.unknown", message=f"{log.name} does not say what it calibrated on")
        elif not _allowed(kind, split):
            message = f"{log.name} calibrated on {kind} {split}".rstrip()
            yield Finding(rule="calibration.source", message=message)
        said = (record.json or {}).get("calibration")
        if isinstance(said, dict):
            yield from _agreement(log, "submission.json", said)
        if log.seed in record.artifacts:
            yield from _header(record, log)


def _header(record: Record, log: LogFacts) -> Iterator[Finding]:
    assert log.seed is not None
    path = record.artifacts[log.seed]
    try:
        said = tensors.inspect(path).contents["provenance"]
    except UserError:
        return  # the probes of the artifact tell
    try:
        CalibrationSource(**said)
    except (UserError, TypeError) as error:  # or keys that no calibration has
        message = f"the header of {path.name} names a calibration that cannot be: {error}"
        yield Finding(rule="calibration.source", message=message)
    yield from _agreement(log, path.name, said)


def _allowed(kind: object, split: object) -> bool:
    return kind in ("train", "self-generated", "none") and split in ("", "train")


def _agreement(log: LogFacts, name: str, said: Mapping[str, Any]) -> Iterator[Finding]:
    """In what both name; a log leaves out what is empty."""
    for key, known in log.calibration.items():
        if key in said and str(said[key]) != known:
            message = f"calibration: {key} is {said[key]} in {name} and {known} in {log.name}"
            yield Finding(rule="calibration.agree", message=message)
