"""The table at the end of a run: bytes, scores, and what general compressors need for the same text."""

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epigram.artifact.size import CapCheck
from epigram.data.dataset import DataFolder
from epigram.evaluation.compressors import MAX_PRIMER_BYTES, MAX_TEXT_BYTES, compare_compressors
from epigram.run.record import RunRecord, scoring_s

COSTLY_BPB = 0.02
"""Bits per byte of which rounding may not take more without a word. Recipes whose rounding was looked at lose 0.0015 to
0.015 (docs/results.md), of which the upper end was a fault that was mended."""


def compressor_rows(data: DataFolder) -> list[dict[str, Any]]:
    """What xz, zstd and brotli need for the validation text, alone and primed with the training text."""
    text = data.text("val", MAX_TEXT_BYTES)  # a token stands for a byte at least, most of the time
    primer = data.text("train", MAX_PRIMER_BYTES, from_end=True)
    rows = compare_compressors(text, primer, whole_text_bytes=data.split_bytes("val"))
    return [row.as_dict() for row in rows]


def log_summary(record: RunRecord) -> None:
    """Print and log the result: quantization by class of tensor, bytes, scores, a sample."""
    result = record.result
    record.log("")
    head = ("class", "method", "weights", "bits a weight", "error", "weighted error")
    _table(record, head, _classes(result))
    sizes = CapCheck(**{key: result[key] for key in ("artifact_bytes", "code_bytes", "cap_bytes")})
    record.log(f"{sizes}, {100 * sizes.total_bytes / result['cap_bytes']:.1f} % of it")
    for line in stable_lines(result):
        record.log(line)
    if (over := result["over_model"]) is not None:
        bits = result["bits_per_weight"]
        record.log(f"codes: {bits:.4f} bits a weight, {100 * over:.3f} % above the entropy of the codec's own model")
    _table(record, ("the validation text", "bits per byte", "nats a token", "tokens", "bytes"), _scores(result))
    if warning := rounding_warning(result, Path(result.get("exported_from", record.folder))):
        record.log(f"warning: {warning}")
    if sample := result.get("sample"):
        record.log("")
        record.log(sample)


def rounding_warning(result: Mapping[str, Any], run: Path) -> str | None:
    """What made the quantized model worse than the float one by more than COSTLY_BPB; None where nothing did.

    result: of a finished run, where both are scored by one method. run: the folder with its checkpoint.
    """
    scores = result["scores"]
    (method,) = scores["float"].keys() & scores["quantized"].keys()
    before, after = (scores[model][method]["val_bpb"] for model in ("float", "quantized"))
    if not after - before > COSTLY_BPB:
        return None
    rounded = [row for row in result["quantization"] if row["method"] != "float16"]
    worst = max(rounded, key=lambda row: row[_error_kind(row)])
    kind = _error_kind(worst)
    found = (
        f"rounding the weights cost {after - before:.4f} bits per byte ({method}: {before:.4f} to {after:.4f}), most "
        f"of all in class {worst['tensor_class']} ({'weighted ' if kind == 'hessian_error' else ''}error "
        f"{worst[kind]:.2e}, {worst['entropy_bits']:.3f} bits a weight)"
    )
    if worst["floor_share"] <= 0.5:
        return f"{found}: finer steps (quant.grid) cost bytes"
    return (
        f"{found}: in {100 * worst['floor_share']:.0f} % of its rows quant.grid.floor sets the step, however small the "
        'weights are; quant.grid.clip = "sigma" rounds in proportion to them. To try it without training again: '
        f"epigram export {shlex.quote(str(run))} --set quant.grid.clip=sigma"
    )


def _error_kind(row: Mapping[str, Any]) -> str:
    """Which of a class's errors to go by: a table that is only looked up has no Hessian, and needs none, since none of
    its columns is read more than another."""
    return "relative_error" if row["hessian_error"] is None else "hessian_error"


def stable_lines(result: dict[str, Any]) -> list[str]:
    """What a program may read from a log at its end: times in seconds, bytes, and where the calibration came from."""
    score_s = scoring_s(result)
    times = {key: result[key] for key in ("train_s", "calibrate_s", "quantize_s", "pack_s")}
    sizes = {key: result[f"{key}_bytes"] for key in ("artifact", "code", "total", "cap")}
    return [
        _stable("final_times", {"steps": result["steps"], **times, "score_s": round(score_s, 3)}),
        _stable("final_bytes", {**sizes, "sha256": result["artifact_sha256"]}),
        _stable("final_calibration", {key: value for key, value in result["calibration"].items() if value != ""}),
    ]


def _stable(name: str, values: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}:{value}" for key, value in values.items())])


def _classes(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["tensor_class"],
            row["method"],
            f"{row['weights']:,}",
            f"{row['entropy_bits']:.3f}",
            f"{row['relative_error']:.2e}",
            "" if row["hessian_error"] is None else f"{row['hessian_error']:.2e}",
        )
        for row in result["quantization"]
    ]


def _scores(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        (
            f"epigram, {model} model, {method}",
            f"{row['val_bpb']:.4f}",
            f"{row['val_nats']:.4f}",
            f"{row['tokens']:,}",
            f"{row['bytes']:,}",
        )
        for model, methods in result["scores"].items()
        for method, row in methods.items()
    ]
    others = result.get("compressors", [])
    return rows + [(row["label"], f"{row['bpb']:.4f}", "", "", f"{row['text_bytes']:,}") for row in others]


def _table(record: RunRecord, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*head)
    for column in table.columns:
        column.justify = "left" if column.header in ("class", "method", "the validation text") else "right"
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    for line in console.file.getvalue().rstrip("\n").split("\n"):  # type: ignore[attr-defined]
        record.log(line)
