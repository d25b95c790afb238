"""`epigram score` under torchrun: one, two and four processes give the same score."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 120


def score(processes: int, *arguments: str) -> dict[str, dict]:
    """The rows by method."""
    epigram = ["-m", "epigram", "score", *arguments, "--device", "cpu", "--json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *epigram],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, "one process prints"
    return json.loads(lines[0])["scores"]


def test_processes_share_a_score(finished: Path, data_path: Path) -> None:
    settings = (str(finished), "--data", str(data_path), "--segment-tokens", "300", "--overlap", "1")
    alone = score(1, *settings)
    assert set(alone) == {"blocks", "sliding", "streaming"}
    for processes in (2, 4):
        shared = score(processes, *settings)
        for method, row in alone.items():
            # Windows are the same; batches of another size sum products in another order, in float32.
            assert shared[method]["val_nats"] == pytest.approx(row["val_nats"], rel=1e-6)
            assert (shared[method]["tokens"], shared[method]["bytes"]) == (row["tokens"], row["bytes"])


@pytest.mark.parametrize("kind", ["sgd", "lora"])
def test_processes_learn_together(finished: Path, data_path: Path, kind: str) -> None:
    """Gradients of chunks are summed, documents are dealt out; the plain score beside it says what was gained."""
    changes = (
        "score.adapt.sgd.chunk_tokens=256", "score.adapt.sgd.epochs=1", "score.adapt.sgd.lr=0.02",
        "score.adapt.lora.rank=2", "score.adapt.lora.chunk_tokens=32", "score.adapt.lora.lr=0.01",
        "score.adapt.lora.num_documents=4",
    )  # fmt: skip
    settings = [word for change in changes for word in ("--set", change)]
    fixed = (str(finished), "--data", str(data_path), "--adapt", kind, "--max-tokens", "1500", "--seq-len", "64")
    alone = score(1, *fixed, *settings)
    assert set(alone) == {"sliding", f"adapted_{kind}"}
    assert abs(alone[f"adapted_{kind}"]["gain_bpb"]) > 1e-3, "it does learn"
    for processes in (2, 3):
        shared = score(processes, *fixed, *settings)
        for method, row in alone.items():
            assert shared[method]["val_nats"] == pytest.approx(row["val_nats"], rel=2e-5)
            assert (shared[method]["tokens"], shared[method]["bytes"]) == (row["tokens"], row["bytes"])
