"""What must be there, and whether submission.json says what it must."""

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta

from epigram.run.submission.findings import Finding
from epigram.run.submission.record import Record
from epigram.run.submission.rules.values import is_number

_WRITTEN = ("%Y/%m/%d", "%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y")  # by others, besides YYYY-MM-DD

FIELDS = ("author", "github_id", "name", "date", "val_bpb")


def files(record: Record) -> Iterator[Finding]:
    for name in ("README.md", "submission.json", "train_gpt.py", "requirements.txt"):
        if not (record.folder / name).is_file():
            yield Finding(rule="files.missing", message=f"{name} is missing")
    for path in sorted(record.folder.rglob("*")):
        if path.is_symlink():
            yield Finding(rule="files.link", message=f"{path.relative_to(record.folder)} is a link")
    if record.json_problem is not None:
        yield Finding(rule="json.unreadable", message=f"submission.json cannot be read: {record.json_problem}")
    if record.json is not None:
        for key in FIELDS:
            if record.json.get(key) in (None, ""):
                yield Finding(rule="json.fields", message=f"submission.json has no {key}")
        if record.json.get("val_bpb") is not None and not is_number(record.json["val_bpb"]):
            yield Finding(rule="json.fields", message="val_bpb of submission.json is no number")
        if record.json.get("date") not in (None, "") and (problem := date_problem(record.json["date"])):
            message = f"date is {json.dumps(record.json['date'])} in submission.json, which {problem}"
            yield Finding(rule="json.date", message=message)


def date_problem(said: object) -> str | None:
    """What is wrong with a date, or a date with a time after it."""
    if (day := _day(str(said))) is None:
        return "is no day"
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)  # it is tomorrow already somewhere
    return "has not come yet" if day > tomorrow else None


def _day(text: str) -> date | None:
    with suppress(ValueError):
        return date.fromisoformat(text[:10])
    for form in _WRITTEN:
        with suppress(ValueError):
            return datetime.strptime(text, form).date()
    return None
