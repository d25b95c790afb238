"""Bytes of the files against the cap, and against what is claimed."""

from collections.abc import Iterator

from epigram.data.files import sha256_of
from epigram.run.submission.findings import Finding
from epigram.run.submission.logs import LogFacts
from epigram.run.submission.measured import measured
from epigram.run.submission.record import Record, size_of
from epigram.run.submission.rules.limits import Limits
from epigram.run.submission.rules.values import agrees, figure

_WHAT = {
    "bytes_code": "bytes of code, the files take",
    "bytes_model": "bytes of the largest artifact, it takes",
    "bytes_total": "bytes in total, the largest seed takes",
}


def sizes(record: Record, limits: Limits) -> Iterator[Finding]:
    for path in record.extras:
        name = path.relative_to(record.folder).as_posix()
        message = (
            f"{name} is neither code nor log nor the artifact of a logged seed: its {size_of(path):,} bytes count with "
            "the code"
        )
        yield Finding(rule="size.extra", message=message)
    code = record.code_bytes
    for log in record.logs:
        size = record.artifact_bytes(log)
        if size is None:
            yield Finding(rule="size.unknown", message=f"{log.name} does not say what the artifact takes")
            continue
        if size + code > limits.cap_bytes:
            over = size + code - limits.cap_bytes
            message = f"seed {log.seed}: {size:,} + {code:,} of code, {over:,} over the cap of {limits.cap_bytes:,}"
            yield Finding(rule="size.cap", message=message)
        yield from _artifact(record, log)
    for key, known in measured(record).bytes().items():
        said = (record.json or {}).get(key)
        if said is not None and not agrees(said, known):
            message = f"submission.json counts {figure(said)} {_WHAT[key]} {known:,}"
            yield Finding(rule="size.counted", message=message)


def _artifact(record: Record, log: LogFacts) -> Iterator[Finding]:
    """The file is the one that the log speaks of."""
    path = record.artifacts.get(log.seed) if log.seed is not None else None
    if path is None:
        return
    if log.sha256 is None:
        message = f"{log.name} does not say which file it scored: {path.name} may be another"
        yield Finding(rule="size.unknown", message=message)
    elif sha256_of(path) != log.sha256:
        yield Finding(rule="size.artifact", message=f"{path.name} is not the file that {log.name} scored")
        return
    if log.artifact_bytes is not None and (size := size_of(path)) != log.artifact_bytes:
        message = f"{path.name} takes {size:,} bytes, the artifact of {log.name} {log.artifact_bytes:,}"
        yield Finding(rule="size.artifact", message=message)
