"""Scores: of the model in training, of the finished one, and of any file on any text."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from epigram.artifact.tokenizer_section import compact
from epigram.data.cache import ensure_built
from epigram.data.dataset import DataFolder, is_published_layout, open_data
from epigram.data.manifest import MANIFEST
from epigram.dist import collectives
from epigram.dist.context import Context, open_context
from epigram.errors import UserError
from epigram.evaluation.probes import Finding
from epigram.evaluation.scorer import score
from epigram.evaluation.windows import METHODS, Method, StreamingConfig, stride_of
from epigram.model.gpt import GPT
from epigram.run.api import Model
from epigram.run.probe import check, probe
from epigram.run.record import final_line
from epigram.run.setup import CACHE, Losses, attach_attention, attach_kernels, scoring_losses
from epigram.run.speed import Work, scoring_work
from epigram.run.weights import TOKENIZER, load_model


def score_split(
    losses: Losses,
    data: DataFolder,
    method: Method,
    context: Context,
    *,
    batch_tokens: int,
    split: str = "val",
    max_tokens: int = 0,
) -> dict[str, Any]:
    """One row of a result: val_bpb, val_nats, tokens, bytes, seq_len, stride, score_s; of method streaming its own
    settings; and for published shards `validation`, which says whose validation split it was.

    max_tokens: score only the beginning of the split, 0 for all of it; the byte total is checked where all is scored.
    """
    tokens = data.stream(split)
    whole = not 0 < max_tokens < len(tokens) - 1
    byte_counts = data.byte_counts(split)
    if not whole:
        tokens = tokens[: max_tokens + 1]
        byte_counts = None if byte_counts is None else byte_counts[: max_tokens + 1]
    start_s = time.perf_counter()
    found = score(
        losses.of(method),
        tokens,
        data.tokenizer.byte_tables(),
        method,
        device=context.device,
        batch_tokens=max(batch_tokens, method.seq_len),
        expected_bytes=data.split_bytes(split) if whole else None,
        byte_counts=byte_counts,
        rank=context.rank,
        world_size=context.world_size,
        reduce=partial(collectives.summed, context) if context.world_size > 1 else None,
        progress=context.is_main,
    )
    context.synchronize()
    score_s = time.perf_counter() - start_s
    return {
        **found.as_dict(),
        "seq_len": method.seq_len,
        "stride": method.stride,
        **({"streaming": asdict(method.streaming)} if method.is_streaming else {}),
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
) -> dict[str, Any]:
    """Score the model at `path` on a split of the data, print the stable lines, and return the rows by method.

    Data that is text is transformed and tokenized as the model's own was. max_tokens: only the beginning of the split,
    0 for all of it. with_probes: put the probes to each method first; ProbeError when one fails. Under torchrun the
    processes share the work; the result is then empty in all but the first.
    """
    with open_context(device) as context:
        model, data = open_both(path, data_path, context)
        seq_len = seq_len or model.context_len
        losses = losses_for_scoring(model.gpt, context, scoring_work(seq_len, batch_tokens))
        rows: dict[str, Any] = {}
        findings: dict[str, list[Finding]] = {}
        if data.validation is not None and split == "val" and context.is_main:
            print(f"validation: {data.validation.text}", flush=True)
        for name in methods or METHODS:
            width = stride_of(name, seq_len, stride or max(seq_len // 8, 1))
            method = Method(name=name, seq_len=seq_len, stride=width, streaming=streaming or StreamingConfig())
            if with_probes:
                dtype = model.gpt.compute_dtype
                findings[name] = probe(
                    losses,
                    data,
                    method,
                    context,
                    dtype=dtype,
                    batch_tokens=max(batch_tokens, seq_len),
                    split=split,
                    isolated=model.gpt.config.isolated,
                )
                if context.is_main:
                    _print_findings(name, findings[name])
            rows[name] = score_split(
                losses, data, method, context, batch_tokens=batch_tokens, split=split, max_tokens=max_tokens
            )
            if context.is_main:
                print(final_line(name, rows[name]["val_nats"], rows[name]["val_bpb"]), flush=True)
        check(findings)
        if not context.is_main:
            return {}
        found = {name: [asdict(finding) for finding in some] for name, some in findings.items()}
        probed = {"probes": found} if with_probes else {}
        return {"model": str(path), "data": data_path, "split": split, "scores": rows, **probed}


def _print_findings(method: str, findings: list[Finding]) -> None:
    for finding in findings:
        verdict = "passed" if finding.passed else "FAILED"
        print(f"probe {method}, {finding.name}: {verdict}: {finding.detail}", flush=True)


def open_both(path: Path, data_path: str, context: Context) -> tuple[Model, DataFolder]:
    """Model and data that belong together; UserError where they do not."""
    device = str(context.device)
    if not is_built(Path(data_path)):
        model = load_model(path, device)
        with tempfile.TemporaryDirectory() as folder:
            (tokenizer := Path(folder) / TOKENIZER).write_bytes(model.tokenizer.proto)
            return model, ensure_built(data_path, CACHE, tokenizer_file=tokenizer, transform=model.transform).data
    data = open_data(data_path)
    model = load_model(path, device, tokenizer=data.tokenizer)
    # An artifact carries what encoding needs of a tokenizer, so the files differ where the tokenizers do not.
    if compact(model.tokenizer.proto) != compact(data.tokenizer.proto):
        raise UserError(
            f"{data_path} was tokenized with another tokenizer than the model's: give the text itself, or build it "
            "again with `epigram data build ... --tokenizer` and the model's own"
        )
    return model, data


def is_built(path: Path) -> bool:
    """Whether this is a data folder, not text."""
    return (path / MANIFEST).exists() or is_published_layout(path)


def losses_for_scoring(model: GPT, context: Context, work: Work) -> Losses:
    """The losses of a model, whose kernels are fused where that can be, else compiled on CUDA if a compiler is there.

    Attention backends are those that are fastest then at `work`. On a CPU a score is over before compiling would pay.
    """
    compiled, _ = attach_kernels(model, "auto", "auto" if context.device.type == "cuda" else "off", context)
    attach_attention(model, "auto", context, compiled, work)
    return scoring_losses(model, compiled, "auto", context)
