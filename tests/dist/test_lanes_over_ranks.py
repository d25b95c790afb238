"""The first 20 steps of a recipe are the same on any number of processes, however its lanes are shared."""

import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 20
RTOL = 1e-5  # of each tensor's norm: sums over lanes in another order, in float32
TIMEOUT_S = 240
FOUR = "lanes=[{count=2, seq_len=32, num_seqs=3}, {count=2, seq_len=64, num_seqs=2}]"
EIGHT = "lanes=[{count=5, seq_len=32, num_seqs=2}, {count=3, seq_len=64, num_seqs=1}]"
UNEVEN = "lanes=[{count=3, seq_len=32, num_seqs=2, ms=1.0}, {count=1, seq_len=64, num_seqs=2, ms=3.0}]"
CASES = {f"{clip} {weight}": (f"gradients.clip={clip}", f"gradients.lane_weight={weight}")
         for clip, weight in itertools.product(("lane", "global"), ("equal", "tokens"))}  # fmt: skip

SCRIPT = """
    import json, multiprocessing, os, socket, sys
    from pathlib import Path

    import torch
    from safetensors.torch import save_file

    from epigram.config import load_recipe
    from epigram.data.dataset import open_data
    from epigram.dist.context import open_context
    from epigram.run.setup import build_session
    from epigram.run.train import plan_step, train_step

    STEPS = {steps}
    SETTINGS = ["budget.steps=20", "run.precision=float32", "schedule.qat_threshold=0", "quant.calibration.seq_len=64"]

    def take_steps(context, data, out, overrides):
        session = build_session(load_recipe("smoke", [*SETTINGS, *overrides]), data, context)
        for _ in range(STEPS):
            train_step(session, plan_step(session, session.clock.elapsed_s(session.step)))
            session.step += 1
        if context.is_main:
            save_file({{name: p.detach() for name, p in session.model.named_parameters()}}, out)
        session.close()
        return session.lanes

    def one(rank, world_size, port, data, out, lanes, cases):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        with open_context("cpu") as context:
            for name, overrides in cases.items():
                mine = take_steps(context, open_data(data), f"{{out}}/{{world_size}} {{name}}", [lanes, *overrides])
        os.write(1, f"{{world_size}} {{rank}}: {{mine}}\\n".encode())  # one piece, whoever else writes

    data, out, lanes, cases, *world_sizes = sys.argv[1:]
    torch.set_num_threads(1)
    for world_size in map(int, world_sizes):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Forked after the imports, which would take longer than the steps; nothing was computed yet: no thread is lost.
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=one, args=(rank, world_size, port, Path(data), out, lanes, json.loads(cases)))
                     for rank in range(world_size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if codes := [process.exitcode for process in processes if process.exitcode]:
            sys.exit(f"exit codes {{codes}} of {{world_size}} processes")
"""


def take_steps(data: Path, folder: Path, lanes: str, cases: dict[str, tuple[str, ...]], *world_sizes: int) -> list[str]:
    """Run SCRIPT, which leaves the last step's parameters in files "WORLD_SIZE CASE"; returns what it printed."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(steps=STEPS)))
    command = [sys.executable, script, data, folder, lanes, json.dumps(cases), *world_sizes]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def assert_same(left: Path, right: Path) -> None:
    one, other = load_file(left), load_file(right)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        distance = torch.linalg.vector_norm((tensor - other[name]).double())
        assert distance <= RTOL * torch.linalg.vector_norm(tensor.double()), f"{right.name}: {name}"


@pytest.mark.slow
def test_four_lanes_on_one_two_and_four_processes(data_path: Path, tmp_path: Path):
    take_steps(data_path, tmp_path, FOUR, CASES, 1, 2, 4)
    for case in CASES:
        assert_same(tmp_path / f"1 {case}", tmp_path / f"2 {case}")
        assert_same(tmp_path / f"1 {case}", tmp_path / f"4 {case}")
    ways = [load_file(tmp_path / f"1 {case}")["banks.up"] for case in CASES]
    assert all((a - b).norm() > 100 * RTOL * a.norm() for a, b in itertools.combinations(ways, 2)), "cases differ"


@pytest.mark.slow
def test_eight_lanes_on_eight_processes(data_path: Path, tmp_path: Path):
    cases = {name: CASES[name] for name in ("lane equal", "global tokens")}
    take_steps(data_path, tmp_path, EIGHT, cases, 1, 8)
    for case in cases:
        assert_same(tmp_path / f"1 {case}", tmp_path / f"8 {case}")


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_lanes(data_path: Path, tmp_path: Path):
    """A lane that is measured to take as long as the three others has a process to itself."""
    cases = {name: CASES[name] for name in ("lane tokens", "global equal")}
    said = take_steps(data_path, tmp_path, UNEVEN, cases, 1, 2, 3)
    shares = ["1 0: (0, 1, 2, 3)", "2 0: (0, 1, 2)", "2 1: (3,)", "3 0: (0, 2)", "3 1: (1,)", "3 2: (3,)"]
    assert said == shares
    for case in cases:
        assert_same(tmp_path / f"1 {case}", tmp_path / f"2 {case}")
        assert_same(tmp_path / f"1 {case}", tmp_path / f"3 {case}")
