"""Scores: of the model in training, of the finished one, and of any file on any text."""

import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from epigram.artifact.tokenizer_section import compact
from epigram.config import load_recipe
from epigram.data.cache import ensure_built
from epigram.data.dataset import DataFolder, is_published_layout, open_data
from epigram.data.manifest import MANIFEST, SPLITS
from epigram.dist import collectives
from epigram.dist.context import Context, open_context
from epigram.errors import UserError
from epigram.evaluation.adapt_config import AdaptConfig
from epigram.evaluation.probes import Finding
from epigram.evaluation.scorer import score
from epigram.evaluation.windows import METHODS, Method, StreamingConfig, stride_of, usual_stride
from epigram.model.config import ModelConfig
from epigram.model.gpt import GPT
from epigram.model.rope import rotary_base
from epigram.run.adapt import Adaptation, beside
from epigram.run.adapt_probe import probe_adapted
from epigram.run.api import Model
from epigram.run.choices import attach_attention, attach_kernels, tokens_at_a_time
from epigram.run.probe import check, probe
from epigram.run.record import CONFIG, RESULT, final_line
from epigram.run.setup import CACHE, Losses, scoring_losses
from epigram.run.speed import Work, scoring_work
from epigram.run.weights import TOKENIZER, load_model, run_folder


def tokens_a_forward(batch_tokens: int, seq_len: int, context: Context) -> int:
    """`batch_tokens`, or what the device's memory holds of it; at least one window of `seq_len`."""
    most = tokens_at_a_time(0, context.device.type) or batch_tokens
    return max(min(batch_tokens, most), seq_len)


def score_split(
    losses: Losses,
    data: DataFolder,
    method: Method,
    context: Context,
    *,
    batch_tokens: int,
    split: str = "val",
    max_tokens: int = 0,
    adaptation: Adaptation | None = None,
) -> dict[str, Any]:
    """One row of a result: val_bpb, val_nats, tokens, bytes, seq_len, stride, score_s; of method streaming its own
    settings; and for published shards `validation`, which says whose validation split it was.

    max_tokens: score only the beginning of the split, 0 for all of it; the byte total is checked where all is scored.
    adaptation: the model learns meanwhile, with windows as in `method`; its settings are in the row.
    """
    whole = not 0 < max_tokens < data.num_tokens(split) - 1
    most = None if whole else max_tokens + 1
    tokens, byte_counts = data.stream(split, most), data.byte_counts(split, most)
    start_s = time.perf_counter()
    make = partial(
        score,
        losses.of(method),
        device=context.device,
        rank=context.rank,
        world_size=context.world_size,
        reduce=partial(collectives.summed, context) if context.world_size > 1 else None,
    )
    found = (make if adaptation is None else adaptation.score)(
        tokens,
        data.tokenizer.byte_tables(),
        method,
        batch_tokens=tokens_a_forward(batch_tokens, method.seq_len, context),
        expected_bytes=data.split_bytes(split) if whole else None,
        byte_counts=byte_counts,
        progress=context.is_main,
    )
    context.synchronize()
    score_s = time.perf_counter() - start_s
    return {
        **found.as_dict(),
        "seq_len": method.seq_len,
        "stride": method.stride,
        **({"streaming": asdict(method.streaming)} if method.is_streaming else {}),
        **(adaptation.settings() if adaptation is not None else {}),
        "score_s": round(score_s, 3),
        **({"validation": data.validation.text} if data.validation is not None and split == "val" else {}),
    }


def score_model(
    path: Path,
    data_path: str,
    *,
    methods: Sequence[str] = (),
    seq_len: int | None = None,
    stride: int | None = None,
    streaming: StreamingConfig | None = None,
    split: str = "val",
    max_tokens: int = 0,
    batch_tokens: int = 65_536,
    device: str = "auto",
    with_probes: bool = False,
    adapt: AdaptConfig | None = None,
    limit_s: float = math.inf,
    precision: str = "",
) -> dict[str, Any]:
    """Score the model at `path` on a split of the data, print the stable lines, and return the rows by method.

    Data that is text is transformed and tokenized as the model's own was, and all of it is scored. max_tokens: only the
    beginning of the split, 0 for all of it. with_probes: put the probes to each method first; ProbeError when one
    fails. adapt: besides, a score while the model learns, beside that of method sliding. limit_s: of all scores, for
    one that adapts. precision: see `load_model`. Under torchrun the processes share the work; the result is then empty
    in all but the first.
    """
    adapt = adapt or AdaptConfig()
    adapts = adapt.kind != "none"
    methods = tuple(methods) or (("sliding",) if adapts else METHODS)
    if adapts and "sliding" not in methods:
        methods = (*methods, "sliding")
    with open_context(device) as context:
        of_folder = is_built(Path(data_path))
        if split != "val" and not of_folder:
            raise UserError(f"{data_path} is text, all of which is scored: leave out --split, or name a data folder")
        model, data = open_both(path, data_path, context, precision, (split,))
        with collectives.together(context):
            if context.is_main and split == "val":  # training text may be large, and nobody claims its score
                data.verify(split)
        seq_len = seq_len or model.context_len
        planned = {name: _method(name, seq_len, stride, streaming) for name in methods}  # mistakes come out before work
        # A file alone says how long the longest lane was, and of others nothing.
        trained = _trained_lens(path) or {model.context_len, min(seq_len, model.context_len)}
        if context.is_main and (warning := unlike_training(seq_len, trained, model.gpt.config)):
            print(f"warning: {warning}", file=sys.stderr)
        num_targets = data.num_tokens(split) - 1
        _require_learning(adapt, seq_len, min(max_tokens or num_targets, num_targets))
        work = replace(scoring_work(seq_len, batch_tokens), backward=adapt.kind == "sgd")
        losses = losses_for_scoring(model.gpt, context, work)
        rows: dict[str, Any] = {}
        findings: dict[str, list[Finding]] = {}
        score_one = partial(
            score_split, losses, data, context=context, batch_tokens=batch_tokens, split=split, max_tokens=max_tokens
        )
        size = tokens_a_forward(batch_tokens, seq_len, context)
        if data.validation is not None and split == "val" and context.is_main:
            print(f"validation: {data.validation.text}", flush=True)
        for name, method in planned.items():
            if with_probes:
                findings[name] = probe(
                    losses,
                    data,
                    method,
                    context,
                    dtype=model.gpt.compute_dtype,
                    batch_tokens=size,
                    split=split,
                    isolated=model.gpt.config.isolated,
                )
                _print_findings(name, findings[name], context)
            rows[name] = score_one(method)
            _print_score(name, rows[name], context)
        if adapts:
            adaptation = adaptation_after(rows, limit_s, adapt, model.gpt, losses, data, context)
            name, method = adaptation.name, planned["sliding"]
            if with_probes:
                findings[name] = probe_adapted(adaptation, data, method, batch_tokens=size, split=split)
                _print_findings(name, findings[name], context)
            rows[name] = beside(score_one(method, adaptation=adaptation), rows["sliding"])
            _print_score(name, rows[name], context)
        check(findings)
        if not context.is_main:
            return {}
        found = {name: [asdict(finding) for finding in some] for name, some in findings.items()}
        more = {"probes": found} if with_probes else {}
        return {
            "model": str(path),
            "data": data_path,
            "split": split if of_folder else "all",
            "scores": rows,
            **more,
        }


def adaptation_after(
    rows: Mapping[str, Mapping[str, Any]],
    limit_s: float,
    config: AdaptConfig,
    model: GPT,
    losses: Losses,
    data: DataFolder,
    context: Context,
) -> Adaptation:
    """How the model is scored while it learns, in what the scores in `rows`, sliding among them, have left of limit_s,
    by rank 0's clock."""
    left_s = limit_s - sum(row["score_s"] for row in rows.values())
    return Adaptation(
        config=config,
        model=model,
        losses=losses,
        context=context,
        bos_id=data.tokenizer.bos_id,
        limit_s=collectives.from_main(context, left_s),
        plain_s=collectives.from_main(context, rows["sliding"]["score_s"]),
    )


def unlike_training(seq_len: int, trained: Collection[int], config: ModelConfig) -> str | None:
    """What is to be said of windows that training, on lengths `trained`, had none like; None for others."""
    if seq_len > max(trained):
        return (
            f"windows of {seq_len:,} tokens are longer than any that the model was trained on ({max(trained):,}): what "
            "lies further back than that may make a score worse"
        )
    if rotary_base(config, seq_len) in {rotary_base(config, length) for length in trained}:
        return None
    lengths = " and ".join(f"{length:,}" for length in sorted(trained))
    return (
        f"windows of {seq_len:,} tokens turn queries and keys by another rotary base than those that the model was "
        f"trained on ({lengths}), which may make a score much worse: score at such a length, or train with "
        'model.rotary_scaling = "none"'
    )


def _trained_lens(path: Path) -> set[int]:
    """Lengths of the lanes that the model at `path` was trained with; none where no run folder says it."""
    if run := run_folder(path):
        with suppress(UserError):  # another program's file may be called so
            return load_recipe(str(run / CONFIG)).seq_lens
    return set()


def _require_learning(adapt: AdaptConfig, seq_len: int, num_targets: int) -> None:
    """Raise UserError for settings that cannot be, or by which nothing would be learned."""
    nothing = adapt.nothing_learned(num_targets)
    if problems := [*adapt.problems(seq_len), *filter(None, [nothing])]:
        raise UserError("; ".join(problems))


def _method(name: str, seq_len: int, stride: int | None, streaming: StreamingConfig | None = None) -> Method:
    """stride: None for an eighth of a window."""
    width = stride_of(name, seq_len, stride or usual_stride(seq_len))
    return Method(name=name, seq_len=seq_len, stride=width, streaming=streaming or StreamingConfig())


def _print_findings(method: str, findings: list[Finding], context: Context) -> None:
    if not context.is_main:
        return
    for finding in findings:
        verdict = "passed" if finding.passed else "FAILED"
        print(f"probe {method}, {finding.name}: {verdict}: {finding.detail}", flush=True)


def _print_score(name: str, row: dict[str, Any], context: Context) -> None:
    if context.is_main:
        print(final_line(name, row["val_nats"], row["val_bpb"]), flush=True)
        print(f"{name}: {row['tokens']:,} tokens, {row['bytes']:,} bytes of text were scored", flush=True)
        if (gain := row.get("gain_bpb")) is not None:
            print(f"{name}: {gain:+.6f} bits per byte better than unadapted, {row['unadapted_bpb']:.6f}", flush=True)


def open_both(
    path: Path, data_path: str, context: Context, precision: str = "", splits: Sequence[str] = SPLITS
) -> tuple[Model, DataFolder]:
    """Model and data that belong together, text as a folder whose val is all of it; UserError where they do not.

    splits: those of a data folder that need be there.
    """
    load = partial(load_model, path, str(context.device), shown=context.is_main, precision=precision)
    if not is_built(Path(data_path)):
        model = load()
        with tempfile.TemporaryDirectory() as folder:
            (tokenizer := Path(folder) / TOKENIZER).write_bytes(model.tokenizer.proto)
            opened = ensure_built(data_path, CACHE, tokenizer_file=tokenizer, transform=model.transform, for_score=True)
        for note in opened.notes:
            print(f"data: {note}", file=sys.stderr)
        if context.is_main:
            _warn_of_known(path, opened.data)
        return model, opened.data
    data = open_data(data_path, splits=splits)
    model = load(tokenizer=data.tokenizer)
    # An artifact carries what encoding needs of a tokenizer, so the files differ where the tokenizers do not.
    ours, theirs = model.tokenizer.proto, data.tokenizer.proto
    if ours != theirs and compact(ours) != compact(theirs):  # equal ones need not fit into an artifact
        raise UserError(
            f"{data_path} was tokenized with another tokenizer than the model's: build it again with "
            "`epigram data build ... --tokenizer` and the model's own, or give `epigram score` the text itself"
        )
    return model, data


def _warn_of_known(run: Path, text: DataFolder) -> None:
    """Say when a text is one that the run learned from. Only run folders say what they learned from."""
    from epigram.data.text_cache import num_known  # it was there to build the text

    try:
        learned = open_data(json.loads((run / RESULT).read_text("utf-8"))["data"])
        known = num_known(text, learned)
    except (OSError, ValueError, KeyError):  # no run folder, or its data are elsewhere now
        return
    if known:
        print(
            f"warning: {known:,} of {len(text.document_hashes('val')):,} documents begin like text that this run "
            "learned from, so their score is too good: what was held out is scored by "
            f"--data {shlex.quote(str(learned.path))}",
            file=sys.stderr,
        )


def is_built(path: Path) -> bool:
    """Whether this is a data folder, not text."""
    return (path / MANIFEST).exists() or is_published_layout(path)


def losses_for_scoring(model: GPT, context: Context, work: Work) -> Losses:
    """The losses of a model, whose kernels are fused where that can be, else compiled where that pays.

    Attention backends are those that are fastest then at `work`.
    """
    compiled, _ = attach_kernels(model, "auto", "auto", context)
    attach_attention(model, "auto", context, compiled, work)
    return scoring_losses(model, compiled, "auto", context)
