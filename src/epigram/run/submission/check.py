"""`epigram check`: all that can be found about a record folder."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from epigram.errors import UserError
from epigram.run.statistics import record_to_beat
from epigram.run.submission.conditions import probe
from epigram.run.submission.execute import execute
from epigram.run.submission.findings import ERROR, Finding
from epigram.run.submission.record import Record, read_record
from epigram.run.submission.rules.code import code
from epigram.run.submission.rules.figures import figures
from epigram.run.submission.rules.files import files
from epigram.run.submission.rules.limits import Against, Limits
from epigram.run.submission.rules.readme import readme
from epigram.run.submission.rules.runs import adaptation, calibration, runs, times
from epigram.run.submission.rules.significance import significance
from epigram.run.submission.rules.sizes import sizes
from epigram.run.submission.rules.values import is_score


def check(
    folder: Path, *, limits: Limits | None = None, against: str | None = None, run_script: bool = False
) -> dict[str, Any]:
    """Findings about a record folder, ours or anybody's, as plain values; `valid` when none is an error.

    against: a record to beat, its mean in nats a token or its folder. run_script: run train_gpt.py, which is foreign
    code; see `epigram.run.submission.execute`. Raises UserError when there is no such folder.
    """
    record = read_record(folder)
    found = list(_findings(record, limits or Limits(), read_against(against), run_script))
    rows = [{**asdict(finding), "severity": finding.severity, "action": finding.action} for finding in found]
    return {
        "folder": str(folder),
        "valid": not any(finding.severity == ERROR for finding in found),
        "findings": rows,
        "executed": run_script,
        "seeds": [log.seed for log in record.logs],
    }


def read_against(record: str | None) -> Against | None:
    """A number is a mean in nats a token; else it is a record folder with logs, or with a val_loss for each seed.

    Raises UserError for figures that no score can be: the test would be against other seeds than the record's.
    """
    if record is None:
        return None
    try:
        mean = float(record)
    except ValueError:
        pass
    else:
        return Against(name=f"the record of {record} nats", nats=(record_to_beat(mean),))
    other = read_record(Path(record))
    if not (nats := _logged_nats(other) or _listed_nats(other)):
        raise UserError(f"{record} says no val_loss in logs or submission.json: give the record's mean in nats instead")
    return Against(name=record, nats=tuple(nats))


def _logged_nats(record: Record) -> list[float]:
    """Of each log that has a final score."""
    for log in record.logs:
        if log.label is not None and log.val_nats is None:
            nats, bpb = log.scores[log.label]
            raise _no_score(f"{record.folder / log.name} has val_loss {nats:g} and val_bpb {bpb:g} in the end")
    return [log.val_nats for log in record.logs if log.val_nats is not None]


def _listed_nats(record: Record) -> list[float]:
    """Of each row of submission.json that has a val_loss."""
    rows = (record.json or {}).get("seed_results")
    pairs = rows.items() if isinstance(rows, dict) else []
    losses = {seed: row["val_loss"] for seed, row in pairs if isinstance(row, dict) and "val_loss" in row}
    for seed, loss in losses.items():
        if not is_score(loss):
            where = record.folder / "submission.json"
            raise _no_score(f"{where} has {json.dumps(loss)} as the val_loss of seed {seed}")
    return [float(loss) for loss in losses.values()]


def _no_score(said: str) -> UserError:
    return UserError(f"{said}, which cannot be: give the record's mean in nats instead")


def _findings(record: Record, limits: Limits, against: Against | None, run_script: bool) -> Iterator[Finding]:
    yield from files(record)
    yield from runs(record)
    yield from figures(record)
    yield from readme(record)
    yield from adaptation(record)
    yield from sizes(record, limits)
    yield from times(record, limits)
    yield from calibration(record)
    yield from code(record)
    yield from significance(record, against)
    kinds = {log.seed: log.adapted for log in record.logs}
    for seed, path in record.artifacts.items():
        yield from probe(path, kinds.get(seed))
    bare = [log.seed for log in record.logs if log.seed not in record.artifacts]
    if bare or not record.artifacts:
        of = f" of seed {', '.join(map(str, bare))}" if record.artifacts else ""
        message = f"there is no artifact of ours{of} in the folder, so the conditions were not probed there"
        yield Finding(rule="condition.untested", message=message)
    if run_script and record.script is not None:
        yield from execute(record, is_ours=record.has_our_script)
    elif record.script is not None:
        yield Finding(rule="run.untested", message="train_gpt.py was read and not run")


def print_check(result: dict[str, Any]) -> None:
    """The same as lines, errors first."""
    order = ("error", "warning", "note")
    for row in sorted(result["findings"], key=lambda row: order.index(row["severity"])):
        print(f"{row['severity']}: {row['rule']}: {row['message']}; {row['action']}")
    errors = sum(row["severity"] == ERROR for row in result["findings"])
    verdict = "nothing speaks against it" if result["valid"] else f"not valid, {errors} error(s)"
    print(f"{result['folder']}: {len(result['seeds'])} log(s), {verdict}")
