"""`epigram submit`: a record folder in the form that parameter-golf publishes, from finished runs of one recipe.

    README.md            what it is, tables made from the logs, how to run it again
    submission.json      the same for programs
    train_gpt.py         the package and the recipe in one file
    train_seed<N>.log    facts of the machine, the recipe as resolved, and the run's log
    model_seed<N>.epigram   the artifact, unless it is left out
    requirements.txt     libraries in the versions that the runs used

What counts against the cap is the size of `train_gpt.py` as it lies in the folder and that of each artifact.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from epigram.artifact.size import CapCheck
from epigram.config import Config, load_recipe, to_tree
from epigram.data.files import sha256_of, unwritable_explained
from epigram.errors import UserError
from epigram.evaluation.adapt_config import adapted
from epigram.run import statistics
from epigram.run.compare import by_seed, read_scored, require_comparable
from epigram.run.export import over_budget
from epigram.run.record import CONFIG, ENVIRONMENT, LOG, RESULT
from epigram.run.submission.bundle import shipped_sources, single_file
from epigram.run.submission.logs import LogFacts, read_log
from epigram.run.submission.measured import Measured, seed_row
from epigram.run.submission.readme import readme
from epigram.run.submission.requirements import requirements
from epigram.run.submission.rules.files import date_problem
from epigram.run.submission.rules.runs import unlike
from epigram.run.weights import ARTIFACT

SCRIPT, README, JSON, REQUIREMENTS = "train_gpt.py", "README.md", "submission.json", "requirements.txt"
_GITHUB = re.compile(r"(?=.{1,39}$)[A-Za-z0-9]+(-[A-Za-z0-9]+)*")
TRACKS = ("track_10min_16mb", "track_non_record_16mb")


@dataclass(frozen=True, kw_only=True)
class About:
    """What only its author can say of a record. name: of the entry, by default the recipe's. date: ISO, by default
    today. record_nats: mean nats a token of the record that is to be beaten, None to leave that out."""

    author: str
    github_id: str
    name: str = ""
    blurb: str = ""
    track: str = TRACKS[0]
    date: str = ""
    record_nats: float | None = None

    def __post_init__(self) -> None:
        if not self.author.strip() or not self.github_id.strip():
            raise UserError("a record names its author and the author's GitHub id")
        if not self.author.isprintable() or not _GITHUB.fullmatch(self.github_id):
            raise UserError(
                f"{self.author!r} and {self.github_id!r} must be a name in one line, and a GitHub id: letters, digits "
                "and single hyphens"
            )
        if self.date and (problem := date_problem(self.date)):
            raise UserError(f"date = {self.date!r} {problem}")
        if self.record_nats is not None:
            statistics.record_to_beat(self.record_nats)
        if self.track not in TRACKS:
            raise UserError(f"track = {self.track!r} must be one of {', '.join(TRACKS)}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A finished run: its folder, seed, resolved config, result and environment."""

    path: Path
    seed: int
    config: Config
    result: dict[str, Any]
    environment: dict[str, Any]


def submit(
    runs: Sequence[Path], out: Path, about: About, *, form: str = "packed", artifacts: bool = True
) -> dict[str, Any]:
    """Write the record folder `out` from one run a seed; returns what submission.json holds.

    form: of train_gpt.py, see `epigram.run.submission.bundle`. artifacts: put the packed models into the folder.
    Raises UserError for runs that are unfinished, over a limit, of several recipes, or too large with this code; then
    nothing is written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another folder")
    sources = read_runs(runs)
    config = _shared_config(sources)
    code = single_file(config, form)
    _require_fit(sources, len(code), form)
    with unwritable_explained(out, "name another place with --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    with scratch as place:
        beside = Path(place) / "record"
        beside.mkdir()
        (beside / SCRIPT).write_bytes(code)
        facts = [_write_run(source, beside, artifacts) for source in sources]
        on_gpu = bool(sources[0].environment.get("gpus"))
        versions = sources[0].environment.get("versions", {})
        needed = requirements(shipped_sources().values(), versions, on_gpu=on_gpu)
        (beside / REQUIREMENTS).write_text(needed, "utf-8")
        found = _metadata(about, sources, facts, code, form)
        (beside / JSON).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
        (beside / README).write_text(readme(found, facts, config, sources[0].environment), "utf-8")
        if out.exists():
            out.rmdir()
        beside.rename(out)
    return found


def read_runs(runs: Sequence[Path]) -> list[Source]:
    """The runs in the order of their seeds. Raises UserError for what cannot be one side of a comparison."""
    scored = [read_scored(path) for path in runs]
    require_comparable(scored)
    by_seed(scored, "nats")
    sources = []
    for path, score in zip(runs, scored, strict=True):
        result = json.loads((path / RESULT).read_text("utf-8"))
        config = load_recipe(str(path / CONFIG))
        if "exported_from" in result or not result.keys() >= {"artifact_sha256", "artifact_bytes", "calibration"}:
            raise UserError(f"{path} is no run from training to score in one go by this release: train it again")
        if problems := over_budget(config, result):
            raise UserError(f"{path} is no valid run: {'; '.join(problems)}")
        if config.budget.clock == "replay":
            raise UserError(f"{path} replayed the clock of another run, so its time is not its own: train it again")
        facts = json.loads((path / ENVIRONMENT).read_text("utf-8"))
        sources.append(Source(path=path, seed=score.seed, config=config, result=result, environment=facts))
    return sorted(sources, key=lambda source: source.seed)


def _shared_config(sources: Sequence[Source]) -> Config:
    """The recipe of all runs; they may differ in their seed, and in the bytes of code that they expected."""
    first = sources[0]
    for source in sources:
        if keys := unlike(to_tree(first.config), to_tree(source.config)):
            raise UserError(
                f"{source.path} has other settings than {first.path} (in {', '.join(keys)}): one recipe a record"
            )
    return first.config


def _require_fit(sources: Sequence[Source], code_bytes: int, form: str) -> None:
    """Raise UserError if any seed is over its cap with the code as it ships."""
    for source in sources:
        size = source.result["artifact_bytes"]
        check = CapCheck(artifact_bytes=size, code_bytes=code_bytes, cap_bytes=source.config.artifact.cap_bytes)
        if not check.fits:
            raise UserError(
                f"{source.path} does not fit with its code: {check}; train with --set artifact.code_bytes={code_bytes} "
                f"--set artifact.over_cap=shrink{'' if form == 'packed' else ', or take --form packed'}"
            )


def _command(words: Sequence[Any]) -> str:
    """What a run says was typed, without the folder that the program lay in."""
    program, *rest = map(str, words)
    return " ".join([Path(program).name, *rest])


def _write_run(source: Source, folder: Path, artifacts: bool) -> LogFacts:
    """The log, and the artifact, of one seed; returns what the log says."""
    path = folder / f"train_seed{source.seed}.log"
    facts = source.environment
    head = {
        "command": _command(facts.get("command") or ["epigram"]),
        "commit": json.dumps(facts.get("commit")),
        "versions": " ".join(f"{name}={version}" for name, version in facts.get("versions", {}).items()),
        "platform": facts.get("platform"),
        "cpu": facts.get("cpu"),
        "gpus": ", ".join(gpu["name"] for gpu in facts.get("gpus", [])) or "none",
        "driver": facts.get("driver"),
        "seed": source.seed,
    }
    lines = [f"{key}: {value}" for key, value in head.items()]
    recipe = (source.path / CONFIG).read_text("utf-8").rstrip()
    log = (source.path / LOG).read_text("utf-8")
    path.write_text("\n".join([*lines, "", "recipe as resolved:", recipe, "", "log:", log]), "utf-8")
    artifact = source.path / ARTIFACT
    if sha256_of(artifact) != source.result["artifact_sha256"]:
        raise UserError(f"{artifact} is not the file that the run scored: train again")
    if artifacts:
        shutil.copyfile(artifact, folder / f"model_seed{source.seed}.epigram")
    return read_log(path)


def _metadata(
    about: About, sources: Sequence[Source], facts: Sequence[LogFacts], code: bytes, form: str
) -> dict[str, Any]:
    """What submission.json holds; every figure of a run comes from its log."""
    config, environment = sources[0].config, sources[0].environment
    nats = [_said(log.val_nats, log, "a final score") for log in facts]
    bpb = [_said(log.val_bpb, log, "a final score") for log in facts]
    sizes = [int(_said(log.artifact_bytes, log, "the artifact's bytes")) for log in facts]
    for log in facts:
        _said(log.steps, log, "how many steps it took")
    known = Measured(nats=tuple(nats), bpb=tuple(bpb), sizes=tuple(sizes), code_bytes=len(code))
    rows = {
        str(source.seed): seed_row(log, size, len(code))
        for source, log, size in zip(sources, facts, sizes, strict=True)
    }
    found: dict[str, Any] = {
        "author": about.author,
        "github_id": about.github_id,
        "name": about.name or config.recipe,
        "blurb": about.blurb or config.summary,
        "date": about.date or date.today().isoformat(),
        "track": about.track,
        **known.means(),
        **known.spreads(),
        "scored": facts[0].label,
        "seeds": [source.seed for source in sources],
        "seed_results": rows,
        **known.bytes(),
        "bytes_cap": config.artifact.cap_bytes,
        "code_form": form,
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "hardware": _hardware(sources[0]),
        "pytorch_version": environment.get("versions", {}).get("torch"),
        "limits": {"train_s": config.budget.train_s, "score_s": config.budget.score_s},
        "calibration": sources[0].result["calibration"],
        "compliance": {
            "claimed": ["strict prefix", "normalised", "scored before any update", "one pass from left to right"],
            "tested_by": "epigram check",
        },
    }
    if (kind := facts[0].adapted) is not None:
        plain = [_said(log.unadapted and log.unadapted[1], log, "its score unadapted") for log in facts]
        found["adapted"] = {
            **sources[0].result["scores"]["quantized"][adapted(kind)]["adapt"],
            "val_bpb_unadapted": statistics.summarize(plain).mean,
            "gain_bpb": statistics.summarize(plain).mean - found["val_bpb"],
        }
    if about.record_nats is not None:
        test = statistics.compare_with_number(nats, about.record_nats, statistics.RECORD_NATS)
        found["record"] = {"val_loss": about.record_nats, **asdict(test)}
    return found


def _hardware(source: Source) -> str:
    """The device that the run computed on, and how many of them."""
    try:
        return f"{source.environment['processes']} x {source.environment['device']['name']}"
    except KeyError as error:
        path = source.path / ENVIRONMENT
        raise UserError(f"{path} has no {error}: the run was made by another release, train it again") from error


def _said(value: float | None, log: LogFacts, what: str) -> float:
    if value is None:
        raise UserError(f"{log.name} does not say {what}: the run was made by another release, train it again")
    return value
