"""What was measured, as rows of a claim's table, and how far apart two rows are."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence.plan import BASE, PUBLISHED, Claim, Experiment, Plan, Variant
from epigram.run.record import RESULT
from epigram.run.statistics import compare

NONE = "-"
"""In a table where there is no figure."""

OR = " or "
"""Between columns of which the lower score counts: models that read best at different lengths, each at its own."""

_EQUAL_TOKENS = 65_536


@dataclass
class Row:
    """One variant of an experiment over its seeds. scores: by column and seed; sizes: by codec and seed.

    counted: bytes that a score is over, by column. text_bytes: of the whole validation text, with those that the
    tokenizer cannot express; 0 where not known.
    """

    label: str
    experiment: Experiment
    variant: str
    seeds: list[int] = field(default_factory=list)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    text_bytes: int = 0
    sizes: dict[str, dict[int, int]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    step_ms: dict[int, float] = field(default_factory=dict)
    gpus: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def values(self, column: str) -> dict[int, float]:
        """By seed; of "one or another" the lower score of each seed."""
        found: dict[int, float] = {}
        for one in column.split(OR):
            for seed, score in self.scores.get(one, {}).items():
                found[seed] = min(score, found.get(seed, score))
        return found

    def counted_in(self, column: str) -> int:
        """Bytes that a score is over, 0 where not known; the same for each of "one or another"."""
        return next((self.counted[one] for one in column.split(OR) if one in self.counted), 0)


def rows_of(plan: Plan, claim: Claim, found: dict[str, Any]) -> list[Row]:
    """The rows of a claim's table: its experiments and those that it borrows, with their variants."""
    by_name = {experiment.name: experiment for experiment in plan.experiments}
    rows = [row_of(plan, by_name[name], Variant(name=BASE, about=words), found) for name, words in claim.also.items()]
    for experiment in plan.experiments:
        if experiment.claim == claim.name and experiment.kind != "bench":
            variants = [Variant(name=BASE, about=experiment.about), *experiment.variants]
            rows += [row_of(plan, experiment, variant, found) for variant in variants]
    return sorted(rows, key=lambda row: row.experiment.train_s) if claim.plot == "curve" else rows


def row_of(plan: Plan, experiment: Experiment, variant: Variant, found: dict[str, Any]) -> Row:
    """One variant of an experiment; without seeds where nothing is measured. found: results by the name of a cell."""
    row = Row(variant.about or variant.name, experiment, variant.name)
    for cell in plan.cells:
        result = found.get(cell.name)
        if cell.experiment is not experiment or result is None:
            continue
        if result["fingerprint"] != cell.fingerprint:
            row.notes.append("measured with settings of before")
        folder = Path(result["folder"]) / ("" if variant.name == BASE else variant.name)
        exported = read_json(folder / RESULT)
        if experiment.kind != "bench" and not exported:
            continue
        row.seeds.append(cell.seed)
        row.gpus.add(result.get("gpu", "unknown"))
        row.text_bytes = result.get("text_bytes", 0)
        for score in result["rows"]:
            if "score" in score and score["variant"] == variant.name:
                column = f"{score['model']} {score['score']}"
                row.scores.setdefault(column, {})[cell.seed] = score["val_bpb"]
                row.counted[column] = score.get("bytes", 0)
        for codec, size in _sizes(exported, experiment.kind).items():
            row.sizes.setdefault(codec, {})[cell.seed] = size
        if "steps" in exported:
            row.steps[cell.seed], row.step_ms[cell.seed] = exported["steps"], exported["step_ms"]
    return row


def _sizes(exported: dict[str, Any], kind: str) -> dict[str, int]:
    """Bytes of the artifact by codec; of a whole job by its own, which is called entropy."""
    sizes = {codec: size["artifact_bytes"] for codec, size in exported.get("codecs", {}).items()}
    return {"entropy": exported["artifact_bytes"]} | sizes if kind == "whole" else sizes


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds, or nothing where there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def rival_of(claim: Claim, row: Row) -> str:
    """Name of the experiment that a row is compared with; its own for a variant; none for the rival itself."""
    if row.variant != BASE:
        return row.experiment.name
    if row.experiment.claim != claim.name:  # a row of another claim: only with another one of those
        return row.experiment.against if row.experiment.against in claim.also else ""
    name = row.experiment.against or claim.baseline
    return "" if name == row.experiment.name else name


class Difference(NamedTuple):
    """Of a row's score and its rival's, negative where the row is better, and what it is a difference to."""

    bpb: float
    words: str

    def __str__(self) -> str:
        return f"{round(self.bpb, 4) + 0.0:+.4f} {self.words}"  # no -0.0000


def difference_of(plan: Plan, claim: Claim, row: Row, found: dict[str, Any]) -> Difference | str:
    """How far below its rival's score the row's is; "" where it has no rival, "-" where one of both is not measured."""
    name = rival_of(claim, row)
    if not name:
        return ""
    if not (ours := row.values(claim.compare)):
        return NONE
    counted = row.counted_in(claim.compare)
    if name == PUBLISHED:
        (share, target_share), whole = of_whole_text(row.text_bytes, counted, claim.target_bytes)
        gain = statistics.fmean(ours.values()) * share - claim.target * target_share
        return Difference(gain, f"to the published {claim.target}{whole}")
    rival = next(e for e in plan.experiments if e.name == name)
    theirs = row_of(plan, rival, Variant(name=BASE), found)
    other = theirs.values(claim.compare)
    if not other:
        return NONE
    (share, other_share), whole = of_whole_text(row.text_bytes, counted, theirs.counted_in(claim.compare))
    ours = {seed: score * share for seed, score in ours.items()}
    other = {seed: score * other_share for seed, score in other.items()}
    if same := ours.keys() & other.keys():  # seed by seed, where that can be
        ours, other = ({seed: side[seed] for seed in same} for side in (ours, other))
    result = compare(ours, other)
    words = f'to "{claim.also.get(name, rival.about)}"{whole}'
    if result.p is not None and result.p_worse is not None:
        words += f" (p = {min(result.p, result.p_worse):.2g})"
    return Difference(-result.gain, words + (", on another GPU" if row.gpus != theirs.gpus else ""))


def of_whole_text(text_bytes: int, *counted: int) -> tuple[list[float], str]:
    """Factors that make scores over `counted` bytes such of the whole text, and words that say so; all 1 where equally
    many were counted.

    A tokenizer that cannot express some bytes does not say what they are either, so its score of the whole text is too
    good by what that would cost: whoever expresses them and is still better is better by at least the difference.
    """
    if not text_bytes or not all(counted) or len(set(counted)) == 1:
        return [1.0] * len(counted), ""
    return [count / text_bytes for count in counted], ", per byte of the whole text"


def times_of(plan: Plan, claim: Claim, found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """ms of a whole step by length, short ones first, and by variant; empty for a length that is not measured."""
    own = sorted((e for e in plan.experiments if e.claim == claim.name), key=lambda e: int(e.about))
    return {e.about: _step_times(found.get(e.name, {})) for e in own}


def _step_times(result: dict[str, Any]) -> dict[str, float]:
    """Median ms of a whole step by variant, scaled to equal tokens."""
    times = {}
    for row in result.get("rows", []):
        whole = next(step for step in row["step"] if step["name"] == "whole step")
        times[row["variant"]] = whole["median_ms"] * _EQUAL_TOKENS / whole["tokens"]
    return times
