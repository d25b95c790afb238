"""Runs one cell of the plan in this process: train, export each variant, score, keep what is small."""

import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.plan import BASE, ROOT, Cell, Spec, Variant
from epigram.artifact import tensors as artifact
from epigram.data.dataset import open_data
from epigram.dist.context import open_context
from epigram.errors import StoppedError, UserError
from epigram.run.adapt import Adaptation
from epigram.run.benchmark import benchmark
from epigram.run.budget import CLOCK_FILE
from epigram.run.job import OverBudgetError, export_job, run_job
from epigram.run.record import CONFIG, ENVIRONMENT, LOG, RESULT, write_atomic
from epigram.run.score import losses_for_scoring, open_both, score_split
from epigram.run.speed import scoring_work
from epigram.run.weights import ARTIFACT

EVIDENCE = "evidence.json"
"""In the folder of a cell: what was run, how it ended, seconds, bytes of the whole validation text, every score."""

REPACK = "repack.json"
"""In the working folder of a cell: the model files whose sizes by other codecs are still to be found."""

BASE_RECIPE = str(ROOT / "benchmarks" / "evidence" / "base.toml")
_TWO_LENGTHS = "lanes=[{count=1,seq_len=2048,num_seqs=24},{count=1,seq_len=6144,num_seqs=4}]"
SHARED = ([_TWO_LENGTHS], [_TWO_LENGTHS, "model.window=0", "model.window_layers=[]"])
"""Settings of the models that are compiled before the cells start: most cells need what one of them needs."""

_BATCH_TOKENS = 196_608
_BENCH_FIGURES = ("name", "median_ms", "p10_ms", "p90_ms", "first_s")
_MOST_PACKERS = 6
_LOG_LINES = 60
"""Of a log that is kept, at each end."""


def execute(
    cell: Cell, folder: Path, work: Path, data: str, recipe: str, device: str, resume: bool = False
) -> dict[str, Any]:
    """Run `cell`; returns what EVIDENCE holds, which is written as it grows.

    Its "stages" are the seconds from the start to the end of training, of each export and of its scores.

    folder: takes the results, a few small files. work: takes the run, with checkpoints and models. data: the data
    folder. recipe: a recipe or the config.toml of the run that is repeated. resume: go on with the run in `work`, which
    SIGTERM ended; its status was "paused".
    """
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVIDENCE).unlink(missing_ok=True)  # until this call knows how it ended
    found = {**describe(cell), "status": "running", "rows": []}
    start_s = time.perf_counter()
    try:
        if cell.experiment.kind == "bench":
            _bench(cell, folder, recipe, device, found)
        else:
            _train(cell, folder, work, data, recipe, device, found)
        found["status"] = "finished"
    except StoppedError as error:
        found.update(status="paused", reason=str(error))
        _keep_run(work / "run", folder, found)  # so that, should the machine be lost, one reads how far it came
    finally:
        found["seconds"] = round(time.perf_counter() - start_s, 1)
        write(folder, found)
        hide_places(folder, {data: f"data/{cell.experiment.data}", str(work): f"runs/{cell.name}"})
    return found


def hide_places(folder: Path, places: dict[str, str]) -> None:
    """Where this machine keeps things is nobody's business: names that a reader's own commands give stand for them."""
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".toml", ".txt")]
    for path in texts:
        text = before = path.read_text("utf-8")
        for place, name in {**places, str(ROOT): "."}.items():
            text = text.replace(place, name) if place else text
        if path.name == ENVIRONMENT:
            text = json.dumps({**json.loads(text), "command": ["python", "-m", "benchmarks.evidence", "run"]}, indent=1)
        if text != before:
            write_atomic(path, text)


def import_kernels() -> None:
    """Import the kernel libraries that this machine has, which takes seconds, while another cell still runs."""
    for name in ("epigram.attention.flash4", "epigram.kernels.products.quack"):
        with suppress(UserError, ImportError):
            importlib.import_module(name)


def compile_shared(device: str) -> None:
    """A few steps of the model of the short experiments, with and without windows, in lanes of two lengths.

    Everything that compiles once for all is then on disk: the kernels of quack and flash-attn-4, which several
    processes compile at a time, and Triton's. What torch.compile makes belongs to a cell's settings, and is left to it.
    """
    for settings in SHARED:
        benchmark("step", recipe=BASE_RECIPE, overrides=settings, repeats=1, device=device, show=False)


def describe(cell: Cell) -> dict[str, Any]:
    """What says which cell a result is of."""
    own = cell.experiment
    words = {"name": cell.name, "experiment": own.name, "seed": cell.seed, "kind": own.kind, "recipe": own.recipe}
    return {**words, "settings": list(cell.settings), "data": own.data, "fingerprint": cell.fingerprint}


def write(folder: Path, found: dict[str, Any]) -> None:
    write_atomic(folder / EVIDENCE, json.dumps(found, indent=1) + "\n")


def _bench(cell: Cell, folder: Path, recipe: str, device: str, found: dict[str, Any]) -> None:
    for variant in cell.experiment.variants:
        settings = [*cell.settings, *variant.set]
        result = benchmark("step", recipe=recipe, overrides=settings, device=device, show=False)
        rows = [{**{key: row[key] for key in _BENCH_FIGURES}, **row["amounts"]} for row in result["rows"]]
        found["rows"].append({"variant": variant.name, "step": rows, "figures": result["figures"]})
        found["gpu"] = gpu_of(result["machine"])
        write_atomic(folder / ENVIRONMENT, json.dumps(result["machine"], indent=1) + "\n")
        write(folder, found)
        print(f"{cell.name} {variant.name}: {rows[0]['median_ms']:.2f} ms", flush=True)


def _train(cell: Cell, folder: Path, work: Path, data: str, recipe: str, device: str, found: dict[str, Any]) -> None:
    own, run = cell.experiment, work / "run"
    whole = own.kind == "whole"
    if (manifest := open_data(data).manifest) is not None:
        found["text_bytes"] = manifest.splits["val"].normalized_bytes
    go_on = run if run.exists() else None
    overrides = [] if go_on else [*cell.settings, f"seed={cell.seed}"]
    until = "export" if whole else "train"
    start_s = time.perf_counter()

    def reached(stage: str) -> None:
        found.setdefault("stages", {})[stage] = round(time.perf_counter() - start_s, 1)

    _allowing_over_budget(
        found,
        partial(
            run_job, recipe, data_path=data, out=run, overrides=overrides, until=until, resume=go_on, device=device
        ),
    )
    _keep_run(run, folder, found)
    reached("trained")
    repack = []
    for variant in cell.exports:
        out = run if whole and variant.name == BASE else work / variant.name
        kept = folder if variant.name == BASE else folder / variant.name
        if out != run:
            shutil.rmtree(out, ignore_errors=True)  # of a call that was ended after training
            _allowing_over_budget(
                found, partial(export_job, run, data_path=data, out=out, overrides=variant.set, device=device)
            )
        _keep_export(out, kept, variant, found)
        reached(f"{variant.name} exported")
        found["rows"] += score_all(out / ARTIFACT, data, variant.scores, device, variant.name, "quantized")
        reached(f"{variant.name} scored")
        write(folder, found)
        if variant.codecs:
            repack.append({"model": str(out / ARTIFACT), "result": str(kept / RESULT), "codecs": list(variant.codecs)})
    checkpoint = max((run / "checkpoints").glob("step-*"))
    found["rows"] += score_all(checkpoint, data, own.float_scores, device, BASE, "float")
    (work / REPACK).write_text(json.dumps(repack))


def _allowing_over_budget(found: dict[str, Any], job: Callable[[], Any]) -> None:
    """A file over its cap is a result like any other, with a note."""
    try:
        job()
    except OverBudgetError as error:
        found.setdefault("notes", []).append(str(error).split(": ", 1)[-1])


def score_all(
    model_path: Path, data_path: str, specs: Sequence[str], device: str, variant: str, model: str
) -> list[dict[str, Any]]:
    """A row for each way to score the model in a file or checkpoint."""
    if not specs:
        return []
    rows = []
    with open_context(device) as context:
        loaded, data = open_both(model_path, data_path, context)
        for text in specs:
            spec = Spec.parse(text)
            work = replace(scoring_work(spec.seq_len, _BATCH_TOKENS), backward=spec.method == "sgd")
            losses = losses_for_scoring(loaded.gpt, context, work)
            adaptation = None
            if spec.adapt is not None:
                adaptation = Adaptation(
                    config=spec.adapt, model=loaded.gpt, losses=losses, context=context, bos_id=data.tokenizer.bos_id
                )
            row = score_split(
                losses, data, spec.windows, context,
                batch_tokens=_BATCH_TOKENS, max_tokens=spec.max_tokens, adaptation=adaptation,
            )  # fmt: skip
            rows.append({"variant": variant, "model": model, "score": text, **row})
            print(f"{variant} {model} {text}: {row['val_bpb']:.5f} bpb in {row['score_s']} s", flush=True)
    return rows


def _keep_run(run: Path, folder: Path, found: dict[str, Any]) -> None:
    """Config, environment, clock and the ends of the log."""
    for name in (CONFIG, ENVIRONMENT, CLOCK_FILE):
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    lines = (run / LOG).read_text("utf-8").splitlines()
    if len(lines) > 2 * _LOG_LINES:
        lines = [*lines[:_LOG_LINES], f"... {len(lines) - 2 * _LOG_LINES} lines ...", *lines[-_LOG_LINES:]]
    (folder / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")
    found["gpu"] = gpu_of(json.loads((run / ENVIRONMENT).read_text("utf-8")))


def _keep_export(out: Path, kept: Path, variant: Variant, found: dict[str, Any]) -> None:
    """The result of an export, whose scores also become rows."""
    kept.mkdir(parents=True, exist_ok=True)
    result = json.loads((out / RESULT).read_text("utf-8"))
    shutil.copyfile(out / RESULT, kept / RESULT)
    for model, methods in result["scores"].items():
        for method, row in methods.items():
            text = f"{method}@{row['seq_len']}" + (f"/{row['stride']}" if method == "sliding" else "")
            found["rows"].append({"variant": variant.name, "model": model, "score": text, **row})


def gpu_of(machine: dict[str, Any]) -> str:
    """The kind of GPU, or cpu."""
    gpus = machine.get("gpus") or []
    return gpus[0]["name"] if gpus else "cpu"


def repack(work: Path) -> None:
    """Sizes of a cell's models by other codecs, into their results; the models are read, not made again.

    Several processes share the work: brotli needs more than a minute for a model of 16 MB.
    """
    jobs = json.loads((work / REPACK).read_text("utf-8"))
    tasks = [(job, codec) for job in jobs for codec in job["codecs"]]
    count = max(1, min(len(tasks), _MOST_PACKERS, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        packed = [(job["result"], codec, pool.submit(_packed_bytes, job["model"], codec)) for job, codec in tasks]
        for path, codec, row in packed:
            result = json.loads(Path(path).read_text("utf-8"))
            result.setdefault("codecs", {})[codec] = row.result()
            write_atomic(Path(path), json.dumps(result, indent=2) + "\n")


def _packed_bytes(model: str, codec: str) -> dict[str, Any]:
    """Size of a model file written again with `codec`, and how long that took."""
    torch.set_num_threads(1)
    contents, start_s = artifact.load(model), time.perf_counter()
    report = artifact.save(other := Path(model).with_suffix(f".{codec}"), contents, codec=codec)
    other.unlink()
    return {"artifact_bytes": report.total_bytes, "pack_s": round(time.perf_counter() - start_s, 1)}
