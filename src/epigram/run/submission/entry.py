"""What `train_gpt.py` does: the main job with the recipe inside it, then the artifact's score by other processes."""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import tomli_w
import torch.distributed as dist

from epigram.config import Config, load_recipe, recipe_names, to_tree
from epigram.errors import UserError
from epigram.run.job import ARTIFACT, run_job
from epigram.run.record import LOG, RESULT, final_line, write_atomic
from epigram.run.score import score_model

TOLERANCE_BPB = 1e-4
"""By how much the two scores of an artifact may differ: other batches, hence other rounding in bfloat16."""

SEPARATE = "separate"
"""Key of the result that holds the other processes' scores."""

_MEETING = timedelta(minutes=5)  # the processes finish their training at about the same time


def main(script: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the single file at `script`; exit code 0 only on success, 2 for a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        if options.recipe:
            print(tomli_w.dumps(to_tree(the_recipe(options.overrides))), end="")
        elif options.score:
            score_artifact(Path(options.score), options.data, options.device, options.overrides)
        else:
            train_and_score(Path(script), options)
    except UserError as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_gpt.py", description="Train, pack and score; or score an artifact.")
    environment = os.environ
    parser.add_argument("--data", default=environment.get("DATA_PATH"), help="folder of token shards (or DATA_PATH)")
    parser.add_argument("--seed", type=int, default=environment.get("SEED"), help="seed (or SEED)")
    parser.add_argument("--out", default=environment.get("RUN_ID"), help="run folder (or RUN_ID)")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--recipe", action="store_true", help="print the recipe and do nothing else")
    parser.add_argument("--score", metavar="MODEL", help="score this artifact and do nothing else")
    return parser


def the_recipe(overrides: Sequence[str] = ()) -> Config:
    """The one recipe that a single file carries."""
    names = recipe_names()
    if len(names) != 1:
        raise UserError(f"this is the package, not a single file: it has {len(names)} recipes")
    return load_recipe(names[0], overrides)


def train_and_score(script: Path, options: argparse.Namespace) -> None:
    """The main job; its code counts with the bytes of this very file. Every process then takes part in scoring."""
    if not options.data:
        raise UserError("say by --data or DATA_PATH where the token shards are")
    overrides = [f"artifact.code_bytes={script.stat().st_size}", *options.overrides]
    overrides += [] if options.seed is None else [f"seed={options.seed}"]
    config = the_recipe(overrides)
    out = Path(options.out) if options.out else Path("runs") / f"{config.recipe}-seed{config.seed}"
    result = run_job(config.recipe, data_path=options.data, out=out, overrides=overrides, device=options.device)
    scores = _score_apart(script, out / ARTIFACT, options)
    if result:
        _compare(out, result, scores)


def score_artifact(model: Path, data: str | None, device: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Score a packed file by the recipe's methods; the last line printed is the result as JSON."""
    if not data:
        raise UserError("say by --data or DATA_PATH where the validation shards are")
    config = the_recipe(overrides)
    score = config.score
    found = score_model(
        model,
        data,
        methods=score.methods,
        seq_len=score.seq_len,
        stride=score.stride,
        streaming=score.streaming,
        batch_tokens=score.batch_tokens,
        device=device,
        adapt=config.score.adapt,
        limit_s=config.budget.score_s,
        precision=config.run.precision,
    )
    if found:
        print(json.dumps(found["scores"]), flush=True)
    return found


def _score_apart(script: Path, artifact: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Scores by a fresh process for each of ours, which knows the artifact's path and nothing of the training."""
    changes = [word for change in options.overrides for word in ("--set", change)]
    command = [sys.executable, str(script.resolve()), "--data", options.data, "--device", options.device, *changes]
    done = subprocess.run(
        [*command, "--score", str(artifact)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **_next_group(os.environ)},
    )
    if done.returncode:
        raise UserError(f"the process that scores {artifact} ended with exit code {done.returncode}")
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def _next_group(environment: Mapping[str, str]) -> dict[str, str]:
    """What differs in the environment of the children, which form a group of their own, with the ranks of ours.

    They meet at another port. Rank 0 finds one that is free and tells it through the store of torchrun's agent, which
    outlives our group; started otherwise, the next port has to do.
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return {}
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {"MASTER_PORT": str(port + 1)}
    store = dist.TCPStore(host, port, is_master=False, timeout=_MEETING)
    key = f"epigram/port of scoring/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if environment["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("", 0))
            store.set(key, str(probe.getsockname()[1]))
    return {"MASTER_PORT": store.get(key).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _compare(out: Path, result: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Log the separate scores and keep them in the result. Raises UserError where they are not those of the run."""
    wrong = []
    with (out / LOG).open("a", encoding="utf-8") as log:
        for method, row in scores.items():
            line = final_line(f"{SEPARATE}_{method}", row["val_nats"], row["val_bpb"])
            print(line, flush=True)
            log.write(line + "\n")
            difference = abs(row["val_bpb"] - result["scores"]["quantized"][method]["val_bpb"])
            if difference > TOLERANCE_BPB:
                wrong.append(f"{method} differs by {difference:.6f} bits per byte")
    path = out / RESULT
    write_atomic(path, json.dumps({**json.loads(path.read_text("utf-8")), SEPARATE: scores}, indent=2) + "\n")
    if wrong:
        raise UserError(f"the artifact scored by another process is not what the run scored: {'; '.join(wrong)}")
