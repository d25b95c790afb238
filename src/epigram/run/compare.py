"""Several runs a side: their scores, a test of significance, and what it means in a sentence."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from epigram.errors import UserError
from epigram.run import statistics
from epigram.run.report.reader import Run, is_number, read_run
from epigram.run.report.summary import best_score
from epigram.run.statistics import Comparison

KEYS = {"bpb": "val_bpb", "nats": "val_nats"}
UNITS = {"bpb": "bits per byte", "nats": "nats a token"}
_HOW = ("tokens", "bytes", "seq_len", "stride")  # of a score; scores that differ in one are not of the same thing


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A finished run's score. how: model, method, and what was scored; equal for scores that can be compared."""

    name: str
    seed: int
    values: dict[str, float]
    how: tuple[Any, ...]
    settings: dict[str, Any]


def compare_runs(
    runs: Sequence[Path],
    against: Sequence[Path] = (),
    *,
    metric: str = "bpb",
    alpha: float = 0.05,
    record_nats: float | None = None,
) -> dict[str, Any]:
    """Scores of both sides with a verdict, as plain JSON values.

    metric: "bpb", or "nats" for nats a token. alpha: one-sided p below which a side is called better. record_nats: the
    mean of a published record, in nats a token; the runs are then also tested against the rule for records.
    Raises UserError for runs that are not finished, repeat a seed, or were scored on other text or in another way.
    """
    if record_nats is not None:
        statistics.record_to_beat(record_nats)
    ours, theirs = [read_scored(path) for path in runs], [read_scored(path) for path in against]
    require_comparable([*ours, *theirs], metric)
    if record_nats is not None:
        require_comparable(ours)
    mine, other = by_seed(ours, metric), by_seed(theirs, metric)
    model, method, *_ = ours[0].how
    found: dict[str, Any] = {"metric": metric, "scored": f"{model}, {method}", "sides": {"runs": _side(ours, metric)}}
    sentences, notes = [], _mixed("runs", ours) + _mixed("against", theirs)
    if theirs:
        found["sides"]["against"] = _side(theirs, metric)
        result = statistics.compare(mine, other)
        found["comparison"] = asdict(result)
        sentences.append(_verdict(result, UNITS[metric], alpha))
        if result.test == "welch" and mine.keys() & other.keys():
            notes.append("some seeds match, but not all: the sides are compared as independent samples")
    else:
        sentences.append(_alone(list(mine.values()), UNITS[metric]))
    if record_nats is not None:
        against_record = statistics.compare_with_number(
            [run.values["nats"] for run in ours], record_nats, statistics.RECORD_NATS
        )
        is_record = against_record.p is not None and against_record.p < statistics.RECORD_P
        found["record"] = {"val_nats": record_nats, "is_record": is_record, **asdict(against_record)}
        sentences.append(_record_verdict(against_record))
    return {**found, "notes": notes, "sentence": " ".join(sentences)}


def read_scored(path: Path) -> Scored:
    """The score that the run in this folder is known by. Raises UserError for one that is not finished."""
    run = read_run(path)
    best, seed = best_score(run), run.result.get("seed", run.config.get("seed"))
    if run.result.get("status") != "finished" or best is None:
        from epigram.run.checkpoint import complete  # torch, which no comparison needs

        resumed, again = f"finish it with epigram train --resume {path}", "train it again, no checkpoint was written"
        raise UserError(f"{path} is no finished run with a score: {resumed if complete(path) else again}")
    model, method, row = best
    if not isinstance(seed, int) or not is_number(row.get("val_nats")):
        raise UserError(
            f"{path}: its result names no {'seed' if not isinstance(seed, int) else 'val_nats'}: run it again"
        )
    values = {metric: float(row[key]) for metric, key in KEYS.items()}
    how = (model, method, *(row.get(key) for key in _HOW))
    return Scored(name=run.name, seed=seed, values=values, how=how, settings=_settings(run))


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key != "seed"}


def require_comparable(runs: Sequence[Scored], metric: str = "nats") -> None:
    """Raise UserError naming the first run whose score is of another kind than that of the first.

    Bits per byte of the same bytes compare whatever the tokenizers, so that their numbers of tokens may differ.
    """
    names = ("model", "method", *_HOW)
    for run in runs[1:]:
        rows = list(zip(names, runs[0].how, run.how, strict=True))
        if metric == "bpb" and all(name != "bytes" or a == b is not None for name, a, b in rows):
            rows = [row for row in rows if row[0] != "tokens"]
        if unlike := [f"{name} {a} and {b}" for name, a, b in rows if a != b]:
            raise UserError(
                f"{runs[0].name} and {run.name} were scored differently ({'; '.join(unlike)}): "
                "export both with the same score settings and data"
            )


def by_seed(runs: Sequence[Scored], metric: str) -> dict[int, float]:
    """Scores of one side. Raises UserError for a seed that comes twice."""
    found: dict[int, float] = {}
    for run in runs:
        if run.seed in found:
            raise UserError(f"seed {run.seed} comes twice on one side ({run.name}): each seed counts once")
        found[run.seed] = run.values[metric]
    return found


def _side(runs: Sequence[Scored], metric: str) -> dict[str, Any]:
    rows = [{"run": run.name, "seed": run.seed, **{KEYS[key]: run.values[key] for key in KEYS}} for run in runs]
    return {"runs": rows, **asdict(statistics.summarize([run.values[metric] for run in runs]))}


def _mixed(side: str, runs: Sequence[Scored]) -> list[str]:
    unlike = [run.name for run in runs[1:] if run.settings != runs[0].settings]
    return [f"{side}: {', '.join(unlike)} had other settings than {runs[0].name}"] if unlike else []


def _verdict(result: Comparison, unit: str, alpha: float) -> str:
    size = f"{abs(result.gain):.5f} {unit}"
    means = f"the mean of RUN is {size} {'lower' if result.gain > 0 else 'higher'}"
    if abs(result.gain) <= statistics.ROUNDING:
        means = "the means are equal"
    if result.p is None or result.p_worse is None or result.interval is None:
        return _untested(result, means)
    spread = f"{result.interval[0]:+.5f} to {result.interval[1]:+.5f}"
    how = f"{result.test} t-test, gain within {spread} at {statistics.CONFIDENCE:.0%} confidence"
    if result.p < alpha:
        return f"RUN is better by {size} (p = {result.p:.2g}, {how})."
    if result.p_worse < alpha:
        return f"RUN is worse by {size} (p = {result.p_worse:.2g}, {how})."
    return f"No difference is shown: {means} (p = {min(result.p, result.p_worse):.2g}, {how}); more seeds would tell."


def _untested(result: Comparison, means: str) -> str:
    if result.reason != statistics.NO_SPREAD:
        return f"No winner is called: {means}, but {result.reason}; train each side with at least two seeds of its own."
    if abs(result.gain) <= statistics.ROUNDING:
        return "There is no difference: both sides have the same scores, as identical runs have."
    return (
        f"No winner is called: {means}, but {result.reason}. Several seeds do not differ like that: see whether each "
        "run was trained with the seed that it names."
    )


def _record_verdict(result: Comparison) -> str:
    claim = f"better than the record by at least {result.margin} nats"
    if result.p is None:
        return f"Whether RUN is {claim} cannot be tested: {result.reason}."
    word = "is" if result.p < statistics.RECORD_P else "is not shown to be"
    return (
        f"RUN {word} {claim}: mean gain {result.gain:.5f} nats, t = {result.t:.2f} on {result.df:g} degrees of "
        f"freedom, one-sided p = {result.p:.2g}, where p < {statistics.RECORD_P} is asked for."
    )


def _alone(scores: Sequence[float], unit: str) -> str:
    found = statistics.summarize(scores)
    if found.sd is None or found.interval is None:
        return f"One seed: {found.mean:.5f} {unit}; its spread is not known."
    low, high = found.interval
    return (
        f"{found.num} seeds: {found.mean:.5f} {unit}, standard deviation {found.sd:.5f}, "
        f"mean within {low:.5f} to {high:.5f} at {statistics.CONFIDENCE:.0%} confidence."
    )
