"""The rules that need nothing but reading: files, figures against each other, limits, code as text, significance."""

import ast
import math
import statistics as plain
from collections.abc import Iterator
from dataclasses import dataclass

from epigram.data.files import sha256_of
from epigram.errors import UserError
from epigram.run import statistics
from epigram.run.submission.bundle import shipped_sources, stripped, unpacked
from epigram.run.submission.findings import Finding
from epigram.run.submission.logs import LogFacts
from epigram.run.submission.record import Record
from epigram.run.submission.requirements import UNPUBLISHED, declared, distribution, imported

FIELDS = ("author", "github_id", "name", "date", "val_bpb")
_NETWORK = frozenset({"socket", "urllib", "requests", "http", "httpx", "aiohttp", "huggingface_hub", "boto3", "ftplib"})
_ROUNDED = 5e-5  # figures are often given with four digits


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of the challenge: bytes of code and artifact, seconds of training and of scoring."""

    cap_bytes: int = 16_000_000
    train_s: float = 600.0
    score_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Against:
    """A record to beat: val_loss in nats a token, of each of its seeds where they are known, else the mean alone."""

    name: str
    nats: tuple[float, ...]


def files(record: Record) -> Iterator[Finding]:
    """What must be there, and whether submission.json says what it must."""
    for name in ("README.md", "submission.json", "train_gpt.py", "requirements.txt"):
        if not (record.folder / name).is_file():
            yield Finding(rule="files.missing", message=f"{name} is missing")
    if record.json_problem is not None:
        yield Finding(rule="json.unreadable", message=f"submission.json cannot be read: {record.json_problem}")
    if record.json is not None:
        for key in FIELDS:
            if record.json.get(key) in (None, ""):
                yield Finding(rule="json.fields", message=f"submission.json has no {key}")
        if record.json.get("val_bpb") is not None and not _is_number(record.json["val_bpb"]):
            yield Finding(rule="json.fields", message="val_bpb of submission.json is no number")


def figures(record: Record) -> Iterator[Finding]:
    """Log against JSON against README."""
    if not record.logs:
        yield Finding(rule="log.missing", message="there is no train*.log")
    found = record.json or {}
    scored = [log for log in record.logs if log.val_bpb is not None]
    for log in record.logs:
        if log.val_bpb is None:
            yield Finding(rule="log.score", message=f"{log.name} has no final score")
    seeds, logged = set(record.seeds), {log.seed for log in record.logs if log.seed is not None}
    if record.seeds and record.logs and seeds != logged:
        message = f"submission.json lists seeds {sorted(seeds)}, the logs are of {sorted(logged)}"
        yield Finding(rule="log.seeds", message=message)
    rows = found.get("seed_results")
    for log in scored:
        row = rows.get(str(log.seed)) if isinstance(rows, dict) else None
        for key, value in (("val_bpb", log.val_bpb), ("val_loss", log.val_nats)):
            said = row.get(key) if isinstance(row, dict) else None
            if said is None or value is None:
                continue
            if not _is_number(said) or abs(float(str(said)) - value) > _ROUNDED:
                message = f"seed {log.seed}: {key} is {said} in submission.json and {value} in {log.name}"
                yield Finding(rule="log.json", message=message)
        if record.readme is not None and not _says(record.readme, log.val_bpb):
            message = f"README.md does not give the val_bpb of {log.name}, {log.val_bpb:.4f}"
            yield Finding(rule="log.readme", message=message)
    if scored and _is_number(found.get("val_bpb")):
        mean = plain.fmean(log.val_bpb for log in scored if log.val_bpb is not None)
        if abs(found["val_bpb"] - mean) > _ROUNDED:
            message = f"val_bpb is {found['val_bpb']} in submission.json, and the mean of the logs is {mean:.6f}"
            yield Finding(rule="json.mean", message=message)


def _is_number(value: object) -> bool:
    """A finite one: 1e999 is JSON, and infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _figure(value: object) -> str:
    return f"{value:,}" if _is_number(value) else repr(value)


def _says(text: str, value: float | None) -> bool:
    """Whether a text gives a figure, with four digits or more."""
    return value is not None and any(f"{value:.{digits}f}" in text for digits in range(4, 9))


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


def sizes(record: Record, limits: Limits) -> Iterator[Finding]:
    """Bytes of the files against the cap, for each seed, and against what is claimed."""
    code, found = record.code_bytes, record.json or {}
    said = found.get("bytes_code")
    if said is not None and said != code:
        message = f"submission.json counts {_figure(said)} bytes of code, the files take {code:,}"
        yield Finding(rule="size.counted", message=message)
    largest = 0
    for log in record.logs:
        size = record.artifact_bytes(log)
        if size is None:
            yield Finding(rule="size.unknown", message=f"{log.name} does not say what the artifact takes")
            continue
        largest = max(largest, size + code)
        if size + code > limits.cap_bytes:
            over = size + code - limits.cap_bytes
            message = f"seed {log.seed}: {size:,} + {code:,} of code, {over:,} over the cap of {limits.cap_bytes:,}"
            yield Finding(rule="size.cap", message=message)
        yield from _artifact(record, log)
    total = found.get("bytes_total")
    if total is not None and largest and not (_is_number(total) and total >= largest):
        message = f"submission.json gives {_figure(total)} bytes in total, the largest seed takes {largest:,}"
        yield Finding(rule="size.counted", message=message)


def _artifact(record: Record, log: LogFacts) -> Iterator[Finding]:
    path = record.artifacts.get(log.seed) if log.seed is not None else None
    if path is not None and log.sha256 and sha256_of(path) != log.sha256:
        yield Finding(rule="size.artifact", message=f"{path.name} is not the file that {log.name} scored")


def times(record: Record, limits: Limits) -> Iterator[Finding]:
    """Training with calibration, and scoring, within their limits."""
    for log in record.logs:
        for what, spent_s, limit_s in (("train", log.spent_s, limits.train_s), ("score", log.score_s, limits.score_s)):
            if spent_s is None:
                yield Finding(rule="time.unknown", message=f"{log.name} does not say how long it took to {what}")
            elif spent_s > limit_s:
                yield Finding(rule=f"time.{what}", message=f"{log.name}: {spent_s:.1f} s of {limit_s:g} s to {what}")


def calibration(record: Record) -> Iterator[Finding]:
    """What the quantizer saw."""
    for log in record.logs:
        kind, split = log.calibration.get("kind"), log.calibration.get("split", "")
        if kind is None:
            yield Finding(rule="calibration.unknown", message=f"{log.name} does not say what it calibrated on")
        elif kind not in ("train", "self-generated", "none") or split not in ("", "train"):
            message = f"{log.name} calibrated on {kind} {split}".rstrip()
            yield Finding(rule="calibration.source", message=message)


def code(record: Record) -> Iterator[Finding]:
    """The script as text: does it parse, is what it imports declared, does it reach for the network or for pickle."""
    if record.script is None:
        return
    try:
        files = unpacked(record.script)
        texts = [record.script, *(text for name, text in (files or {}).items() if name.endswith(".py"))]
        modules = {name for text in texts for name in imported(text)}
    except (SyntaxError, ValueError, UserError) as error:
        yield Finding(rule="code.syntax", message=f"train_gpt.py cannot be parsed: {error}")
        return
    if files is None:
        yield from _dangers(ast.parse(record.script))
    else:
        yield from _package(files)
    # What is imported where it may be missing is optional: in functions of ours, behind a choice of the recipe.
    optional = {"triton", "flash-attn-4", "quack-kernels", "wandb", "tensorboard"} if files is not None else set()
    known = declared(record.requirements or "") | optional | {"epigram"}
    for name in sorted({distribution(module) for module in modules - UNPUBLISHED} - known):
        yield Finding(rule="code.requirements", message=f"train_gpt.py imports {name}, which is not declared")


def _dangers(tree: ast.Module) -> Iterator[Finding]:
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    for name in sorted(names & _NETWORK):
        yield Finding(rule="code.network", message=f"train_gpt.py imports {name}")
    for call in sorted(calls & {"torch.load", "pickle.load", "pickle.loads"}):
        yield Finding(rule="code.pickle", message=f"train_gpt.py calls {call}")


def _package(files: dict[str, str]) -> Iterator[Finding]:
    ours, theirs = shipped_sources(), {name: text for name, text in files.items() if name.endswith(".py")}
    unlike = sorted(ours.keys() ^ theirs.keys())
    unlike += [n for n in sorted(ours.keys() & theirs.keys()) if theirs[n] not in (ours[n], stripped(ours[n]))]
    if unlike:
        message = f"train_gpt.py holds another package than this one, in {len(unlike)} file(s), {unlike[0]} first"
        yield Finding(rule="code.package", message=message)


def significance(record: Record, against: Against | None) -> Iterator[Finding]:
    """Better than a given record by 0.005 nats at p < 0.01: Welch's test, or that of one sample for a mean alone."""
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
