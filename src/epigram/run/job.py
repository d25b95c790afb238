"""The main job from start to end: data, training, export, score, report of what came out."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from epigram.config import Config, load_recipe, to_tree
from epigram.data.cache import ensure_built
from epigram.data.dataset import DataFolder
from epigram.data.files import sha256_of
from epigram.dist import collectives
from epigram.dist.context import Context, open_context
from epigram.errors import UserError
from epigram.evaluation.bpb import check_bytes
from epigram.model.gpt import GPT
from epigram.optim.base import restore
from epigram.run import checkpoint
from epigram.run.adapt import OverTimeError, beside
from epigram.run.budget import timed
from epigram.run.export import Quantized, left_to_quantize_s, over_budget, quantize
from epigram.run.fit import pack_to_fit
from epigram.run.machine import computing, environment, peak_memory_bytes
from epigram.run.record import CONFIG, RunRecord, check_new
from epigram.run.score import adaptation_after, score_split, unlike_training
from epigram.run.setup import CACHE, Losses, Session, build_model, build_session, check_fit, scoring_losses, state_of
from epigram.run.size import forecast_bytes
from epigram.run.space import check_memory, check_room
from epigram.run.speed import scoring_work
from epigram.run.summary import compressor_rows, log_summary
from epigram.run.train import figures, is_complete, save_checkpoint, train
from epigram.run.train import resume as resume_session
from epigram.run.warmup import warm_up
from epigram.run.weights import ARTIFACT, TOKENIZER, final_weights, load_model
from epigram.typed import differing

_AFTER_TRAINING = ("recipe", "summary", "data.", "quant.", "artifact.", "score.", "run.", "budget.score_s")
"""Beginnings of the names of settings that the steps after training read, or that only describe."""


class OverBudgetError(UserError):
    """The run is finished and scored, but exceeded one of its limits."""


def run_job(
    recipe: str,
    *,
    data_path: str | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    until: str = "export",
    resume: Path | None = None,
    device: str = "auto",
    warn: Callable[[Config], str | None] | None = None,
) -> dict[str, Any]:
    """Train a recipe and bring it to a scored artifact; returns the result that the run folder holds.

    data_path: None for the data of the run that is resumed, else for the text that every Python carries. until: "train"
    stops after the last step. resume: a run folder to go on with; its own config counts then. warn: what is wrong with
    the config although it can be run, which the log then says.
    Raises UserError for what the user can mend; the run folder says how far it came. The result is empty in processes
    other than the first.
    """
    with open_context(device) as context:
        config = run_config(resume, overrides) if resume else load_recipe(recipe, overrides)
        check_memory(config, context.device.type)
        if out and not resume:  # before text is built, which may take minutes
            with collectives.together(context):
                if context.is_main:
                    check_new(out)
        saved = checkpoint.load(resume) if resume else None
        data = prepare_data(data_path or (_data_of(saved) if saved else "stdlib"), config)
        times: dict[str, float] = {}
        with timed(times, "setup_s"):
            session = build_session(config, data, context)
        if resume and saved:  # before the folder is touched: what does not fit must not change it
            resume_session(session, saved)
            with collectives.together(context):
                if context.is_main and is_complete(session):
                    _require_same_training(run_config(resume, ()), config, "the training of this run is complete")
        unchanged = partial(_require_newest, resume, session.step) if resume else None
        with _record(resume or out or _new_folder(config.recipe, context), config, context, unchanged) as record:
            try:
                _begin(session, record)
                _log_time(record, times, "setup_s", "set-up of model and kernels")
                if warn is not None and context.is_main and (warning := warn(config)):
                    record.log(f"warning: {warning}")
                _train(session, record)
                if until == "export":
                    finish_run(config, session.model, session.losses, data, context, record)
            finally:
                session.close()
        return _checked(record) if until == "export" else _result(record)


def export_job(
    run: Path,
    *,
    data_path: str | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> dict[str, Any]:
    """The steps after training, from a run's newest checkpoint, with changed settings, into a folder of its own.

    average.mode = "none" exports the weights that the last step left, of a run that averaged too. Other settings of
    training cannot be changed.
    """
    with open_context(device) as context:
        config, saved = run_config(run, overrides), checkpoint.load(run)
        trained = run_config(run, ())
        if config.average.mode == "none":
            trained = replace(trained, average=replace(trained.average, mode="none"))
        _require_same_training(trained, config, "an export cannot change how the model was trained")
        data = prepare_data(data_path or _data_of(saved), config)
        check_fit(config, data)
        if data.tokenizer.proto != (run / TOKENIZER).read_bytes():
            raise UserError(f"{data.path} has another tokenizer than {run} was trained with: name the data of the run")
        with collectives.together(context):
            if context.is_main:
                _check_held_out(data)
        work = scoring_work(config.score.seq_len, config.score.batch_tokens)
        model, compiled, paths = build_model(config, context, work)
        weights = final_weights(saved, averaged=config.average.mode != "none")
        restore(model.state_dict(), weights, "this model")
        with _record(out or _next_export(run, context), config, context) as record:
            record.environment(environment(paths, **computing(context.device, context.world_size)))
            facts = {**saved.state["facts"], "data": str(data.path.resolve())}
            record.update(**facts, exported_from=str(run.resolve()), paths=paths)
            losses = scoring_losses(model, compiled, config.run.attention, context)
            finish_run(config, model, losses, data, context, record)
        return _checked(record)


def run_config(run: Path, overrides: Sequence[str]) -> Config:
    """The config that a run folder holds, changed. Raises UserError when it is no run folder."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is no run folder: it has no {CONFIG}")
    return load_recipe(str(run / CONFIG), overrides)


def _require_same_training(trained: Config, config: Config, why: str) -> None:
    """Raise UserError where settings differ that nothing after training reads: the folder would tell of a training that
    never was."""
    names = differing(to_tree(trained), to_tree(config))
    if changed := [name for name in names if not name.startswith(_AFTER_TRAINING)]:
        raise UserError(f"{why} ({', '.join(changed)}): train one with such settings")


def _data_of(saved: checkpoint.Checkpoint) -> str:
    """Where the data of a run are. Raises UserError when they are there no more."""
    path: str = saved.state["facts"]["data"]
    if not Path(path).exists():
        raise UserError(f"the data of this run are no longer at {path}: say by --data where they are")
    return path


def prepare_data(path: str, config: Config) -> DataFolder:
    """The data at `path`; text is built by the first process that comes, and the others wait for it."""
    opened = ensure_built(
        path,
        CACHE,
        vocab_size=config.model.vocab_size,
        normalization=config.data.normalization,
        val_fraction=config.data.val_frac,
    )
    for note in opened.notes:
        print(f"data: {note}", file=sys.stderr)
    return opened.data


def finish_run(
    config: Config, model: GPT, losses: Losses, data: DataFolder, context: Context, record: RunRecord
) -> None:
    """Quantize `model`, pack it, read the file back and score that; every figure goes into the record.

    losses: those of scoring with the weights of `model`, which afterwards holds those of the file.

    The float model is scored by the first of the recipe's methods, so that like is compared with like.
    """
    quantized = quantize(model, config, data, context)
    record.update(
        calibrate_s=round(quantized.calibrate_s, 3),
        quantize_s=round(quantized.quantize_s, 3),
        quantization=quantized.report.to_dicts(),
        calibration=quantized.source.to_dict(),
    )
    first = config.score.method(config.score.methods[0])
    score = partial(score_split, losses, data, context=context, batch_tokens=config.score.batch_tokens)
    record.score("float", first.name, score(first))
    path = record.folder / ARTIFACT
    with collectives.together(context):
        if context.is_main:
            _pack(path, config, model, quantized, data, record)
    packed = load_model(path, str(context.device), tokenizer=data.tokenizer, shown=context.is_main)
    # What is scored are the weights of the file; the graph that scored the float model serves again.
    model.load_state_dict(packed.gpt.state_dict())
    for name in config.score.methods:
        record.score("quantized", name, score(config.score.method(name)))
    if config.score.adapt.kind != "none":
        _score_adapting(config, model, losses, data, context, record)
    if config.run.sample_tokens and context.is_main:
        prompt = config.run.sample_prompt
        text = packed.generate(prompt, config.run.sample_tokens)
        record.sample(prompt, text, temperature=0.8)
        record.update(sample=prompt + text)
    if config.run.compressors and context.is_main:
        record.update(compressors=compressor_rows(data))
    if context.is_main:
        record.update(over_budget=over_budget(config, record.result))
        log_summary(record)


def _pack(path: Path, config: Config, model: GPT, quantized: Quantized, data: DataFolder, record: RunRecord) -> None:
    """Write the artifact, which may take quantizing again; times, sizes and bits go into the record."""
    times: dict[str, float] = {}
    with timed(times, "pack_s"):
        packed = pack_to_fit(
            path,
            config,
            model,
            quantized.hessians,
            (quantized.stored, quantized.report),
            data.tokenizer,
            quantized.source.to_dict(),
            data.transform,
            first_s=quantized.quantize_s,
            left_s=left_to_quantize_s(config, record.result),
        )
    if packed.not_shrunk:
        record.log(f"warning: over the cap, and written as configured: {packed.not_shrunk}")
        record.update(not_shrunk=packed.not_shrunk)
    elif packed.trials > 1:
        record.log(f"over the cap as configured: steps times {packed.factor:.4f}, {packed.trials} files written")
    sizes = packed.sizes
    record.update(
        # Quantizing again is part of training, like the first time.
        quantize_s=round(quantized.quantize_s + packed.quantize_s, 3),
        pack_s=round(times["pack_s"] - packed.quantize_s, 3),
        quantization=packed.report.to_dicts(),
        shrink_factor=packed.factor,
        artifact_bytes=sizes.total_bytes,
        artifact_sha256=sha256_of(path),
        code_bytes=config.artifact.code_bytes,
        total_bytes=sizes.total_bytes + config.artifact.code_bytes,
        cap_bytes=config.artifact.cap_bytes,
        sizes=sizes.rows(),
        bits_per_weight=sizes.bits_per_weight,
        over_model=sizes.over_model,
    )


def _score_adapting(
    config: Config, model: GPT, losses: Losses, data: DataFolder, context: Context, record: RunRecord
) -> None:
    """The score of a model that learns meanwhile, in what the other scores left of the time; or why there is none."""
    rows = record.result["scores"]["quantized"]
    adaptation = adaptation_after(rows, config.budget.score_s, config.score.adapt, model, losses, data, context)
    size = config.score.batch_tokens
    if nothing := config.score.adapt.nothing_learned(data.num_tokens("val") - 1):
        record.log(f"warning: {nothing}")
    start_s = time.perf_counter()
    try:
        row = score_split(
            losses, data, config.score.method("sliding"), context, batch_tokens=size, adaptation=adaptation
        )
    except OverTimeError as error:  # the run has its other scores; the limit is judged at its end
        record.log(f"warning: {error}")
        record.update(adapt_stopped=str(error), adapt_stopped_s=round(time.perf_counter() - start_s, 3))
        return
    record.score("quantized", adaptation.name, beside(row, rows["sliding"]))


def _begin(session: Session, record: RunRecord) -> None:
    config, data = session.config, session.data
    with collectives.together(session.context):
        if record.writes:
            check_room(record.folder, config, state_of(session))
            _check_held_out(data)
    record.result.clear()  # a run that is resumed has other results than it had
    context = session.context
    record.environment(environment(session.paths, **computing(context.device, context.world_size)))
    if record.writes:
        (record.folder / TOKENIZER).write_bytes(data.tokenizer.proto)
    record.log(f"run folder: {record.folder}")
    record.log(_holdings(data))
    for name, choice in session.paths.items():
        record.log(f"{name}: {choice}")
    num_parameters = sum(p.numel() for p in session.model.parameters())
    record.log(f"recipe {config.recipe}, seed {config.seed}: {num_parameters:,} parameters")
    forecast = forecast_bytes(config, session.model)
    record.log(_forecast(config, forecast))
    if warning := unlike_training(config.score.seq_len, config.seq_lens, config.model):
        record.log(f"warning: {warning}")
    where = str(data.path.resolve())
    record.update(
        recipe=config.recipe, seed=config.seed, parameters=num_parameters, data=where, forecast_bytes=forecast
    )
    if data.transform:  # whoever loads a checkpoint must know it
        record.update(transform=data.transform)


def _check_held_out(data: DataFolder) -> None:
    """Raises UserError or DataError for what no score could be made of: told now, not after the training."""
    tokens = data.stream("val")
    if len(tokens) < 2:
        raise UserError(f"{data.path} holds out {len(tokens)} tokens, and a score needs two: build it with more text")
    data.verify("val")
    check_bytes(tokens, data.tokenizer.byte_tables(), data.split_bytes("val"), data.byte_counts("val"))


def _holdings(data: DataFolder) -> str:
    """How much there is to learn from and to be scored on, in a line."""
    train, val = data.num_tokens("train"), data.num_tokens("val")
    num_bytes = data.split_bytes("val")
    of_text = f" ({num_bytes:,} bytes of text)" if num_bytes is not None else ""
    return f"data {data.path.name}: {train:,} tokens to train on, {val:,}{of_text} held out for the score"


def _log_time(record: RunRecord, times: dict[str, float], name: str, words: str, end: str = "") -> None:
    """What was spent before the clock starts."""
    record.log(f"{words}: {times[name]:.1f} s, not counted{end}")
    record.update(**{name: round(times[name], 3)})


def _forecast(config: Config, forecast: int) -> str:
    """What the artifact will probably take of its cap, in a line; forecast: its bytes without the code."""
    expected, cap = forecast + config.artifact.code_bytes, config.artifact.cap_bytes
    line = (
        f"forecast: artifact and code take about {expected:,} bytes, {100 * expected / cap:.0f} % of the cap of {cap:,}"
    )
    end = "end over it" if config.artifact.over_cap == "fail" else "be shrunk to it"
    return line if expected <= cap else f"warning: {line}; the run will probably {end}"


def _train(session: Session, record: RunRecord) -> None:
    config = session.config
    times: dict[str, float] = {}
    with timed(times, "warmup_s"):
        warm_up(session)
    _log_time(record, times, "warmup_s", "warm-up", "; all state restored")
    first = config.score.method("blocks")
    validate = partial(
        score_split,
        session.losses,
        session.data,
        first,
        session.context,
        batch_tokens=config.score.batch_tokens,
        max_tokens=config.run.val_tokens,
    )
    train(session, record, lambda: _validation(validate()))
    record.update(
        **figures(session), peak_memory_bytes=peak_memory_bytes(session.context.device.type), paths=session.paths
    )
    save_checkpoint(session, record)  # with the weights that training would go on from
    session.saver.wait()
    session.average.copy_to()


def _validation(row: dict[str, Any]) -> dict[str, float]:
    return {"val_nats": row["val_nats"], "val_bpb": row["val_bpb"]}


def _checked(record: RunRecord) -> dict[str, Any]:
    if record.writes and (problems := record.result["over_budget"]):
        raise OverBudgetError(f"{record.folder}: " + "; ".join(problems))
    return _result(record)


def _result(record: RunRecord) -> dict[str, Any]:
    return {"run": str(record.folder), **record.result} if record.writes else {}


def _record(folder: Path, config: Config, context: Context, resume: Callable[[], None] | None = None) -> RunRecord:
    """The record in `folder`; when rank 0 cannot use it, no rank goes on. resume: see `ready` of `RunRecord`."""
    tree, resumed = to_tree(config), resume is not None
    with collectives.together(context):
        return RunRecord(folder, tree, writers=config.run.writers, resume=resumed, ready=resume, rank=context.rank)


def _require_newest(run: Path, step: int) -> None:
    """Raises UserError where the checkpoint of `step`, which has been read, is not the run's last one any more."""
    if (found := checkpoint.complete(run)) and (newest := checkpoint.step_of(found[-1])) != step:
        raise UserError(
            f"{run} went on from step {step} to {newest} in another process, which has ended meanwhile: resume again"
        )


def _new_folder(recipe: str, context: Context) -> Path:
    """runs/RECIPE-DATE-TIME, the same on every rank, with a number where a run of the same second has that name."""
    now = time.localtime(collectives.from_main(context, time.time()))
    stem = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S', now)}"
    return _first_free(lambda number: Path(stem if number == 1 else f"{stem}-{number}"), context)


def _next_export(run: Path, context: Context) -> Path:
    return _first_free(lambda number: run / f"export-{number}", context)


def _first_free(numbered: Callable[[int], Path], context: Context) -> Path:
    """The first of numbered(1), numbered(2), ... that is not there, the same on every rank."""
    number = 1
    while context.is_main and numbered(number).exists():
        number += 1
    return numbered(int(collectives.from_main(context, number)))
