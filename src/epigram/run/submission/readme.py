"""The README of a record folder: tables of what the logs say, and how to make it again."""

from collections.abc import Mapping, Sequence
from typing import Any

from epigram.config import Config
from epigram.run import statistics
from epigram.run.submission.logs import LogFacts

_SEED_HEADS = (
    "seed", "val_loss", "val_bpb", "steps", "training s", "calibration + quantization s", "scoring s",
    "artifact bytes", "total bytes",
)  # fmt: skip
# How paragraphs start by which `epigram check` finds them again.
HEADLINE_START = "**val_bpb:"
TABLE_START = f"| {' | '.join(_SEED_HEADS)} |"
CODE_START = "`train_gpt.py` as it lies here takes"


def readme(found: Mapping[str, Any], logs: Sequence[LogFacts], config: Config, environment: Mapping[str, Any]) -> str:
    """Markdown. found: submission.json. logs: in the order of its seeds."""
    parts = [
        f"# {found['name']}",
        found["blurb"],
        _headline(found),
        "## Results",
        "Every figure is read from the logs in this folder; losses are nats a token.",
        table(_SEED_HEADS, [_seed_row(seed, log, found) for seed, log in zip(found["seeds"], logs, strict=True)]),
        _scored(found, config),
        *_significance(found),
        "## Bytes",
        _bytes(found),
        "## Running it",
        _commands(found, config, environment["processes"]),
        "## Time",
        _time(found, config),
        "## What the score may use",
        _conditions(found, config),
    ]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _headline(found: Mapping[str, Any]) -> str:
    spread = "" if found["val_bpb_std"] is None else f" (standard deviation {found['val_bpb_std']:.6f})"
    seeds = len(found["seeds"])
    return (
        f"{HEADLINE_START} {found['val_bpb']:.6f}**{spread}, val_loss {found['val_loss']:.6f}, mean of {seeds} seed"
        f"{'s' if seeds > 1 else ''}, largest total {found['bytes_total']:,} bytes, {found['hardware']}, "
        f"by {found['author']} ({found['github_id']}), {found['date']}."
    )


def _seed_row(seed: int, log: LogFacts, found: Mapping[str, Any]) -> list[str]:
    assert log.artifact_bytes is not None
    return [
        str(seed),
        f"{log.val_nats:.8f}",
        f"{log.val_bpb:.8f}",
        f"{log.steps:,}",
        _seconds(log.train_s),
        _seconds((log.calibrate_s or 0.0) + (log.quantize_s or 0.0)),
        _seconds(log.score_s),
        f"{log.artifact_bytes:,}",
        f"{log.artifact_bytes + found['bytes_code']:,}",
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _scored(found: Mapping[str, Any], config: Config) -> str:
    if "adapted" in found:
        return _adapted(found, config)
    return (
        f"The score is `{found['scored']}` of each log: the packed file, read back, windows of "
        f"{config.score.seq_len:,} tokens, stride {config.score.stride:,}; each token of the validation split is "
        "scored exactly once."
    )


def _adapted(found: Mapping[str, Any], config: Config) -> str:
    how, width, stride = found["adapted"], f"{config.score.seq_len:,}", f"{config.score.stride:,}"
    reads = (
        f"windows of {width} tokens, stride {stride}; after each chunk of them all weights learn its tokens by SGD"
        if how["kind"] == "sgd"
        else f"each document from its start, in windows of up to {width} tokens; after each chunk of it low-rank "
        "adapters of this document learn its tokens"
    )
    settings = ", ".join(f"{k} {v}" for k, v in how.items() if k not in ("kind", "val_bpb_unadapted", "gain_bpb"))
    return (
        f"The score is `{found['scored']}` of each log, of a model that **adapts while it is scored**: the packed "
        f"file, read back, {reads} ({settings}). Each token of the validation split is scored exactly once, before "
        "anything has learned it. Without adaptation the same files have "
        f"**{how['val_bpb_unadapted']:.6f} bits per byte** by sliding windows (stride {stride}): "
        f"adaptation gains {how['gain_bpb']:+.6f}."
    )


def _significance(found: Mapping[str, Any]) -> list[str]:
    record = found.get("record")
    if record is None:
        return []
    if record["p"] is None:
        return [f"Against the record of {record['val_loss']} nats nothing can be tested: {record['reason']}."]
    word = "Beats" if record["p"] < statistics.RECORD_P else "Is not shown to beat"
    return [
        f"{word} the record of {record['val_loss']} nats by at least {record['margin']}: mean gain "
        f"{record['gain']:.5f}, t = {record['t']:.3f} on {record['df']:g} degrees of freedom, one-sided "
        f"p = {record['p']:.3g} "
        f"(p < {statistics.RECORD_P} is asked for)."
    ]


def _bytes(found: Mapping[str, Any]) -> str:
    return (
        f"{CODE_START} {found['bytes_code']:,} bytes ({found['code_form']} form), the largest "
        f"artifact {found['bytes_model']:,}: together {found['bytes_total']:,} of {found['bytes_cap']:,}."
    )


def _commands(found: Mapping[str, Any], config: Config, processes: int) -> str:
    """How to repeat it, on as many processes as it ran on: with others a run gets more or fewer steps in its time."""
    most = len(config.flat_lanes)
    launch = f"torchrun --standalone --nproc-per-node {processes}"
    others = f" Any number of processes up to {most} runs the same recipe, its lanes in turn." if most > 1 else ""
    seeds, first = " ".join(map(str, found["seeds"])), found["seeds"][0]
    return (
        "```\npip install -r requirements.txt\n"
        f"for seed in {seeds}; do\n"
        f"    {launch} train_gpt.py --data DATA --seed $seed --out run_$seed\n"
        "done\n"
        f"python train_gpt.py --data DATA --score run_{first}/model.epigram      # score an artifact alone\n```\n\n"
        "DATA is a folder with token shards (`*_train_*.bin`, `*_val_*.bin`) and their tokenizer (`*.model`)."
        f"{others}"
    )


def _time(found: Mapping[str, Any], config: Config) -> str:
    limits = found["limits"]
    clock = (
        "measured time" if config.budget.clock == "wall" else f"{config.budget.steps} counted steps, whatever they take"
    )
    return (
        f"Training, calibration and quantization share {limits['train_s']:g} s ({clock}); scoring has "
        f"{limits['score_s']:g} s. Warm-up comes before the clock, on made-up tokens, and restores all state."
    )


def _conditions(found: Mapping[str, Any], config: Config) -> str:
    calibration = found["calibration"]
    words = ", ".join(f"{key} {value}" for key, value in calibration.items() if value != "")
    weights = "the weights do not change while scoring"
    if "adapted" in found:
        weights = "the weights change while scoring, by tokens that are scored already and by no others"
    return (
        "The prediction of a token depends on the artifact and the tokens before it; it is a softmax over all "
        f"{config.model.vocab_size:,} tokens; {weights}; each token is scored once, "
        "left to right. Scoring reads the artifact and the validation shards, no network. Calibration: "
        f"{words} (the artifact's header says the same)."
    )
