"""What a run comes to: its verdict, the score it is known by, and the tables and bars of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from epigram.evaluation.adapt_config import KINDS, adapted
from epigram.run.report import tables
from epigram.run.report.reader import Run, as_table, is_number

# Which score is the run's score: the quantized model before the float one, the method with the longest
# context first; before all that of a model that adapts meanwhile, where the recipe asked for it.
_METHODS = (*map(adapted, KINDS), "sliding", "streaming", "blocks")
PREFERENCE = [(model, method) for model in ("quantized", "float") for method in _METHODS]

# What counts against the time of training.
TIMES = (("train_s", "training"), ("calibrate_s", "calibration"), ("quantize_s", "quantization"))


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A labelled bar; share of the longest one."""

    label: str
    value: str
    share: float
    is_model: bool


def verdict(run: Run) -> tuple[Literal["good", "bad", "open"], str]:
    """How the run ended, and whether it kept to its cap and its time."""
    status, reason = run.result.get("status"), run.result.get("reason", "no reason was recorded")
    if status in ("failed", "interrupted"):
        return "bad", f"The run {'failed' if status == 'failed' else 'was interrupted'}: {reason}"
    if status != "finished":
        return "open", "The run has not finished: it is still going, or it was killed."
    told = run.result.get("over_budget")
    if problems := list(map(str, told)) if isinstance(told, list) else _exceeded(run):
        return "bad", f"Finished, but {' and '.join(problems)}."
    limits = ("cap", size_and_cap(run)[1]), ("time", time_and_budget(run)[1])
    known = [word for word, limit in limits if limit is not None]
    return "good", f"Finished within its {' and its '.join(known)}." if known else "Finished."


def _exceeded(run: Run) -> list[str]:
    """The limits that a run exceeded which does not say so itself: one that only trained, or of an earlier release."""
    (size, cap), (seconds, budget_s) = size_and_cap(run), time_and_budget(run)
    problems = []
    if size is not None and cap is not None and size > cap:
        problems.append(f"over its cap by {size - cap:,.0f} bytes")
    timed = as_table(run.config.get("budget")).get("clock", "wall") == "wall"
    if timed and seconds is not None and budget_s is not None and seconds > budget_s:
        problems.append(f"over its time by {tables.duration(seconds - budget_s)}")
    return problems


def size_and_cap(run: Run) -> tuple[float | None, float | None]:
    """Bytes that count, and the most allowed; None for what is not known."""
    size = first_number(run.result, "total_bytes", "artifact_bytes")
    cap = first_number({**as_table(run.config.get("artifact")), **run.result}, "cap_bytes")
    return size, cap


def time_and_budget(run: Run) -> tuple[float | None, float | None]:
    """Seconds of training, calibration and quantization together, and the most allowed; None for unknown."""
    parts = [run.result[key] for key, _ in TIMES if is_number(run.result.get(key))]
    return sum(parts) if parts else None, first_number(as_table(run.config.get("budget")), "train_s")


def best_score(run: Run) -> tuple[str, str, dict[str, Any]] | None:
    """(model, method, row) of the score that the run is known by."""
    scores = run.part("scores")
    for model, method in PREFERENCE:
        row = as_table(as_table(scores.get(model)).get(method))
        if is_number(row.get("val_bpb")):
            return model, method, row
    return None


def overview(runs: Sequence[Run]) -> tables.Grid:
    """One row a run, the best score standing out."""
    rows, scores = [], []
    for run in runs:
        best = best_score(run)
        scores.append(best[2]["val_bpb"] if best else None)
        rows.append(
            {
                "run": run.name,
                "status": run.result.get("status", "unknown"),
                "val_bpb": scores[-1],
                "scored": f"{best[0]}, {best[1]}" if best else None,
                "bytes": size_and_cap(run)[0],
                "cap": size_and_cap(run)[1],
                "train_s": time_and_budget(run)[0],
                "steps": run.result.get("steps"),
                "seed": run.result.get("seed", run.config.get("seed")),
            }
        )
    known = [score for score in scores if score is not None]
    return tables.grid(rows, strong=[scores.index(min(known))] if known else [])


def score_rows(run: Run) -> list[dict[str, Any]]:
    """One row a method: the float model beside the quantized one, and how they were scored."""
    scores = run.part("scores")
    by_model = {model: as_table(scores.get(model)) for model in ("float", "quantized")}
    rows = []
    for method in dict.fromkeys(m for table in by_model.values() for m in table):
        before, after = (as_table(by_model[model].get(method)) for model in ("float", "quantized"))
        old, new = first_number(before, "val_bpb"), first_number(after, "val_bpb")
        lost = None if old is None or new is None else new - old
        row = {"method": method, "float_bpb": old, "quantized_bpb": new, "lost_bpb": lost}
        rows.append({**row, **{key: value for key, value in (after or before).items() if key != "val_bpb"}})
    return rows


def compare(run: Run) -> tuple[list[Bar], str]:
    """The model's bits per byte among those of general compressors, most bits first; and a note."""
    rows, best = run.list_of_rows("compressors"), best_score(run)
    found = []
    for row in rows:
        if is_number(row.get("bpb")):
            found.append((str(row.get("label", "?")), row["bpb"], False))
    if not found:
        return [], ""
    if best:
        found.append((f"this model, {best[0]}, {best[1]}", best[2]["val_bpb"], True))
    found.sort(key=lambda entry: -entry[1])
    longest = max(found[0][1], 1e-9)
    bars = [Bar(label=a, value=f"{b:.3f}", share=b / longest, is_model=c) for a, b, c in found]
    return bars, _baseline_note(rows)


def _baseline_note(rows: Sequence[dict[str, Any]]) -> str:
    text, whole = (first_number(rows[0], key) for key in ("text_bytes", "whole_text_bytes"))
    if text is None or whole is None:
        return ""
    part = f"the first {text:,} of its {whole:,} bytes" if text < whole else f"all its {text:,} bytes"
    primer = max(first_number(row, "primer_bytes") or 0 for row in rows)
    primed = f"Primed: after {primer:,} bytes of training text, themselves not counted." if primer else ""
    return f"Bits per byte of the validation text; the compressors read {part}. {primed}".rstrip()


def samples(run: Run) -> list[tuple[str, str, str]]:
    """(prompt, text, how it was made) of each sample; that of the result where no other was recorded."""
    found = []
    for row in run.samples:
        rest = {key: value for key, value in row.items() if key not in ("prompt", "text")}
        how = ", ".join(f"{key} {value}" for key, value in tables.pairs(rest))
        found.append((str(row.get("prompt", "")), str(row.get("text", "")), how))
    alone = run.result.get("sample")
    return found or ([("", alone, "")] if isinstance(alone, str) and alone else [])


def first_number(table: dict[str, Any], *keys: str) -> float | None:
    """The number under the first of `keys` that has one."""
    return next((table[key] for key in keys if is_number(table.get(key))), None)
