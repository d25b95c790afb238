"""A run killed at random moments, checkpoint writes included, ends as one that nobody killed, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "kill_soak.py"
KILLS = 20
TIMEOUT_S = 300  # it takes some 20 s on two idle cores
SMALLER = (
    "lanes=[{count=1, seq_len=32, num_seqs=1}]", "quant.calibration.seq_len=32", "score.seq_len=32", "score.stride=16",
    "model.num_layers=2", "model.model_dim=32", "model.mlp_dim=32", "model.window_layers=[1]", "model.xsa_layers=[1]",
    "model.value_embed_layers=[1]", "model.backout_layer=1",
)  # fmt: skip


@pytest.mark.slow
def test_twenty_kills_lose_nothing_but_steps_since_the_last_checkpoint():
    """The script replays a whole run's clock; it asserts that no checkpoint is lost and that the ends are the same."""
    settings = [part for setting in SMALLER for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, str(SOAK), "--kills", str(KILLS), *settings],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["kills"], found["identical"]) == (KILLS, True)
    assert found["in the midst of writing"] > 0
    assert found["in the midst of writing"] + found["between checkpoints"] == KILLS
