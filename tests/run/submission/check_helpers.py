"""Breaking a record folder, and what `epigram check` finds then."""

import hashlib
import json
from pathlib import Path

from record_helpers import CAP

from epigram.run.submission.check import check
from epigram.run.submission.rules.limits import Limits

LIMITS = Limits(cap_bytes=CAP)


def found(folder: Path, **options) -> dict[str, str]:
    """Rule -> messages of all findings but notes."""
    result, messages = check(folder, limits=options.pop("limits", LIMITS), **options), dict[str, str]()
    for row in result["findings"]:
        if row["severity"] != "note":
            messages[row["rule"]] = "; ".join(filter(None, (messages.get(row["rule"]), row["message"])))
    return messages


def change(path: Path, old: str, new: str) -> None:
    text = path.read_bytes()
    assert old.encode() in text
    path.write_bytes(text.replace(old.encode(), new.encode()))


def set_json(folder: Path, **values) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop_json(folder: Path, key: str) -> None:
    path = folder / "submission.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def drop_from_log(folder: Path, *words: str, seed: int = 1) -> None:
    """Lines that hold any of the words."""
    log = folder / f"train_seed{seed}.log"
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not any(word in line for word in words)]
    assert len(kept) < len(lines)
    log.write_text("".join(kept))


def another_script(folder: Path, code: str) -> None:
    (folder / "train_gpt.py").write_text(code)
    count_script(folder)


def count_script(folder: Path) -> None:
    """Let submission.json speak of the script as it lies there; README.md still speaks of the one before."""
    script, path = (folder / "train_gpt.py").read_bytes(), folder / "submission.json"
    values = json.loads(path.read_text())
    for row in values["seed_results"].values():
        row["bytes_total"] = row["bytes_model"] + len(script)
    total = values["bytes_model"] + len(script)
    digest = hashlib.sha256(script).hexdigest()
    set_json(folder, **values | {"bytes_code": len(script), "bytes_total": total, "code_sha256": digest})
