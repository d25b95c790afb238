"""submission.json against the logs: whatever it gives that a log gives too is the same.

A field that is not there is not asked for, except those of `epigram.run.submission.rules.files`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from epigram.run import statistics
from epigram.run.submission.findings import Finding
from epigram.run.submission.logs import LogFacts, is_count
from epigram.run.submission.measured import measured, seed_row
from epigram.run.submission.record import Record
from epigram.run.submission.rules.values import ROUNDED, agrees, figure, is_number

_TIMES_OURS, _TIMES = 5e-4, 0.5  # seconds: ours are given with three digits, others may be whole


def figures(record: Record) -> Iterator[Finding]:
    if not record.logs:
        yield Finding(rule="log.missing", message="there is no train*.log")
    for log in record.logs:
        if log.val_bpb is None:
            yield Finding(rule="log.score", message=f"{log.name} has no final score of the packed model")
    yield from _seeds(record)
    found = record.json or {}
    rows = found.get("seed_results")
    for log in record.logs:
        row = rows.get(str(log.seed)) if isinstance(rows, dict) else None
        yield from _row(record, log, row)
        yield from _settings(found, log)
    yield from _statistics(record, found)


def _seeds(record: Record) -> Iterator[Finding]:
    """The seeds of `seeds`, of the rows of `seed_results` and of the logs are the same."""
    found, logged = record.json or {}, sorted({log.seed for log in record.logs if log.seed is not None})
    if not record.logs:
        return
    for key in ("seeds", "seed_results"):
        if key in found and not found[key]:
            message = f"{key} is {json.dumps(found[key])} in submission.json, the logs are of {logged}"
            yield Finding(rule="log.seeds", message=message)
    listed = record.seeds
    if listed and sorted(listed) != logged:
        message = f"submission.json lists seeds {sorted(listed)}, the logs are of {logged}"
        yield Finding(rule="log.seeds", message=message)
    rows = found.get("seed_results")
    numbered = sorted(int(key) for key in rows if is_count(key)) if isinstance(rows, dict) else []
    if numbered and numbered != logged and listed != numbered:
        message = f"seed_results of submission.json has rows of seeds {numbered}, the logs are of {logged}"
        yield Finding(rule="log.seeds", message=message)


def _row(record: Record, log: LogFacts, row: object) -> Iterator[Finding]:
    if not isinstance(row, dict):
        return
    for key, known in seed_row(log, record.artifact_bytes(log), record.code_bytes).items():
        said = row.get(key)
        if said is None or known is None:
            continue
        if isinstance(known, str):
            same = str(said).lower() == known.lower()
        else:
            same = agrees(said, known, _tolerance(key, log))
        if not same:
            where = "the files and " if key == "bytes_total" else ""
            message = f"seed {log.seed}: {key} is {said} in submission.json and {known} in {where}{log.name}"
            yield Finding(rule="log.json", message=message)


def _tolerance(key: str, log: LogFacts) -> float:
    if key.startswith("val_"):
        return ROUNDED
    return (_TIMES_OURS if log.is_ours else _TIMES) if key.endswith("_s") else 0.0


def _settings(found: Mapping[str, Any], log: LogFacts) -> Iterator[Finding]:
    """What a log of ours says of its recipe and its machine."""
    if not log.is_ours:
        return
    for key, known in _said_by(log).items():
        said: Any = found
        for part in key.split("."):
            said = said.get(part) if isinstance(said, dict) else None
        if said is not None and said != known:
            message = f"{key} is {json.dumps(said)} in submission.json and {json.dumps(known)} in {log.name}"
            yield Finding(rule="log.json", message=message)
    named = str(found.get("hardware") or "").partition(" x ")[2]
    machine = f"{log.machine.get('gpus')}\n{log.machine.get('cpu')}"
    if named and log.machine and named not in machine:
        message = f"hardware is {named} in submission.json and none of that name in {log.name}"
        yield Finding(rule="log.json", message=message)


def _said_by(log: LogFacts) -> dict[str, Any]:
    """Key in submission.json -> what the log has for it."""
    known: dict[str, Any] = {} if log.label is None else {"scored": log.label}
    versions = dict(word.partition("=")[::2] for word in log.machine.get("versions", "").split())
    if "torch" in versions:
        known["pytorch_version"] = versions["torch"]
    for section, key, name in (
        ("budget", "train_s", "limits.train_s"),
        ("budget", "score_s", "limits.score_s"),
        ("artifact", "cap_bytes", "bytes_cap"),
    ):
        part = (log.recipe or {}).get(section)
        if isinstance(part, dict) and key in part:
            known[name] = part[key]
    if log.adapted is not None:
        known["adapted.kind"] = log.adapted
    return known


def _statistics(record: Record, found: Mapping[str, Any]) -> Iterator[Finding]:
    """Means, spreads and the test against a record, over the seeds."""
    known = measured(record)
    for key, mean in known.means().items():
        if (said := found.get(key)) is not None and not agrees(said, mean, ROUNDED):
            message = f"{key} is {said} in submission.json, and the mean of the logs is {mean:.6f}"
            yield Finding(rule="json.mean", message=message)
    seeds = len(known.bpb)
    for key, spread in known.spreads().items():
        if spread is None:
            continue
        # Others may divide by n and not by n - 1.
        ways = [spread] if record.is_ours else [spread, spread * ((seeds - 1) / seeds) ** 0.5]
        if (said := found.get(key)) is not None and not any(agrees(said, way, ROUNDED) for way in ways):
            message = f"{key} is {said} in submission.json, and that of the logs is {spread:.6f}"
            yield Finding(rule="json.spread", message=message)
    yield from _adaptation(record, found)
    yield from _record(found.get("record"), known.nats)


def _adaptation(record: Record, found: Mapping[str, Any]) -> Iterator[Finding]:
    """What learning while scoring is said to gain."""
    said, plain = found.get("adapted"), [log.unadapted[1] for log in record.logs if log.unadapted is not None]
    bpb = measured(record).means().get("val_bpb")
    if not isinstance(said, dict) or bpb is None or len(plain) != len(record.logs):
        return
    mean = statistics.summarize(plain).mean
    for key, known in (("val_bpb_unadapted", mean), ("gain_bpb", mean - bpb)):
        if key in said and not agrees(said[key], known, ROUNDED):
            message = f"adapted.{key} is {said[key]} in submission.json, and that of the logs is {known:.6f}"
            yield Finding(rule="json.mean", message=message)


def _record(said: object, nats: tuple[float, ...]) -> Iterator[Finding]:
    """A claim to beat a record, as `epigram submit --record` writes it."""
    if not isinstance(said, dict) or not is_number(said.get("val_loss")) or not nats:
        return
    known = asdict(statistics.compare_with_number(nats, float(said["val_loss"]), statistics.RECORD_NATS))
    for key in ("gain", "margin", "standard_error", "df", "t", "p"):
        claim, value = said.get(key), known[key]
        if claim is None:
            continue
        if value is None:
            message = (
                f"record.{key} is {figure(claim)} in submission.json, and nothing can be tested: {known['reason']}"
            )
        elif not agrees(claim, value, max(ROUNDED if key in ("gain", "standard_error") else 0.0, 1e-3 * abs(value))):
            message = f"record.{key} is {figure(claim)} in submission.json, and by the logs it is {value:.6g}"
        else:
            continue
        yield Finding(rule="json.record", message=message)
