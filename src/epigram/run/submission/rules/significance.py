"""Better than a given record by 0.005 nats at p < 0.01."""

from collections.abc import Iterator

from epigram.run import statistics
from epigram.run.submission.findings import Finding
from epigram.run.submission.record import Record
from epigram.run.submission.rules.limits import Against


def significance(record: Record, against: Against | None) -> Iterator[Finding]:
    """By Welch's test, or that of one sample for a mean alone."""
    nats = [log.val_nats for log in record.logs if log.val_nats is not None]
    if len(nats) < 3:
        yield Finding(rule="significance.seeds", message=f"{len(nats)} seed(s) have a score")
    if against is None or not nats:
        return
    margin = statistics.RECORD_NATS
    if len(against.nats) > 1:
        found = statistics.welch(nats, against.nats, margin)
    else:
        found = statistics.compare_with_number(nats, against.nats[0], margin)
    if found.p is None or found.p >= statistics.RECORD_P:
        why = found.reason if found.p is None else f"t = {found.t:.2f}, p = {found.p:.3g} by {found.test}"
        message = f"not shown to be better than {against.name} by {margin} nats: gain {found.gain:.5f}, {why}"
        yield Finding(rule="significance.record", message=message)
