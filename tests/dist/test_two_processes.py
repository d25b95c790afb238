"""Two processes (gloo, on the CPU) do what one does, and when one of them fails none of them stays behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from run_helpers import SHORT, losses_of, result_of, rows_of, saved_tensors, train_run

TIMEOUT_S = 90
FOUR_LANES = (
    "lanes=[{count=2, seq_len=64, num_seqs=4}, {count=2, seq_len=128, num_seqs=2}]",
    "run.val_every=4",
    "run.val_tokens=500",
    "run.checkpoint_every_s=10",
)


def environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    of_process = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **of_process, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_two(script: str, folder: Path, *arguments: str, num_processes: int = 2) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of the processes, two or more, that run `script`, without torchrun to end them."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(path), *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [
        subprocess.Popen(command, env=environment(rank, num_processes, port), **pipes) for rank in range(num_processes)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def train_two(script: str, folder: Path, data_path: Path, run: Path) -> list[tuple[int, str, str]]:
    """`run_two` of a script that trains four lanes for some steps, into `run`."""
    settings = [argument for setting in (*SHORT, *FOUR_LANES) for argument in ("--set", setting)]
    arguments = ("train", "smoke", "--data", str(data_path), "--out", str(run), "--device", "cpu", *settings)
    return run_two(script, folder, *arguments)


MOST_S = 30.0  # from a fault on one process to the end of the last one
FAULT_NOW = "fault_now = lambda: open(sys.argv[0] + '.fault', 'w').write(repr(__import__('time').time()))"


def seconds_since_fault(folder: Path) -> float:
    """To be called when all processes have ended; the script called `fault_now` when the fault came."""
    return time.time() - float((folder / "script.py.fault").read_text())


def said_at_the_end(script: str, folder: Path, data_path: Path, run: Path) -> str:
    """What both processes of a training with a fault say, which end soon after it and as after an error."""
    found = train_two(script, folder, data_path, run)
    assert seconds_since_fault(folder) < MOST_S
    assert [code for code, _, _ in found] == [2, 2]
    assert result_of(run)["status"] == "failed"
    return "".join(errors for _, _, errors in found)


def test_what_processes_tell_each_other(tmp_path: Path):
    script = """
        import torch
        from epigram.dist import collectives, watch
        from epigram.dist.collectives import LostPeerError
        from epigram.dist.context import open_context

        def together(failing):
            try:
                with collectives.together(context):
                    if context.rank in failing:
                        raise ValueError("own")
            except (ValueError, LostPeerError) as error:
                return type(error).__name__
            return "well"

        with open_context("cpu") as context:
            r = context.rank
            mixed = [torch.tensor([1.0 + r, 10.0]), torch.tensor(5 * r), torch.full((2, 2), 0.5 + r),
                     torch.tensor(0.1, dtype=torch.float64)]
            collectives.sum_(context, mixed)
            assert [t.tolist() for t in mixed] == [[3.0, 20.0], 5, [[2.0, 2.0], [2.0, 2.0]], 0.2], mixed
            first, whole = torch.full((2,), 1.0 + r), torch.arange(4.0)[:, None] + 10 * r
            messages = [collectives.begin_sum(context, [first]), collectives.begin_scatter(context, whole)]
            own = messages[1].wait()
            assert own.flatten().tolist() == [[10, 12], [14, 16]][r]
            assert own.data_ptr() == whole[2 * r].data_ptr(), "where it was"
            assert collectives.begin_gather(context, own).wait().flatten().tolist() == [10, 12, 14, 16]
            messages[0].wait()
            assert messages[0].wait().tolist() == first.tolist() == [3, 3], "may be waited for again"
            assert collectives.from_main(context, 0.1 + r) == 0.1, "to the last bit"
            assert together([]) == "well"
            assert together([0]) == ("ValueError" if r == 0 else "LostPeerError")
            assert together([1]) == ("ValueError" if r == 1 else "LostPeerError")
            assert together([0, 1]) == "ValueError"
            news_s, watch._NEWS_S = watch._NEWS_S, 0.1
            try:
                collectives.begin_sum(context, [torch.ones(2, dtype=torch.uint16)]).wait()
            except RuntimeError as error:
                assert str(error) == "Invalid scalar type", "nobody else is to blame"
            else:
                raise AssertionError("gloo can add these")
            watch._NEWS_S = news_s
            assert together([]) == "well", "and they can go on"
            if r == 1:
                raise SystemExit(5)
            for call in (lambda: collectives.begin_gather(context, torch.ones(2)).wait(),
                         lambda: collectives.sum_(context, [torch.ones(2)]),
                         lambda: collectives.from_main(context, 1.0), lambda: together([]), lambda: together([0])):
                try:
                    print(call())
                except LostPeerError as error:
                    assert str(error) == "rank 1: stopped with exit code 5"
                    print("LostPeerError")
    """
    (code, out, err), (other, _, _) = run_two(script, tmp_path)
    assert (code, other) == (0, 5), err
    assert out.split()[:2] == ["LostPeerError"] * 2
    assert out.split()[3:] == ["LostPeerError", "ValueError"]


def test_all_processes_take_the_backend_that_the_first_one_measured(tmp_path: Path):
    """Their own clocks say the opposite of each other; and where the first one fails, none waits for it."""
    script = """
        import torch
        from epigram.attention.base import Request, choose
        from epigram.dist.collectives import LostPeerError
        from epigram.dist.context import open_context
        from epigram.run import speed

        request = Request(device_type="cuda", capability=(8, 0), dtype=torch.bfloat16, head_dim=64, num_heads=8,
                          num_kv_heads=4, window=512, compiled=True)
        work = speed.Work(shapes=((1, 8),), backward=True)

        def measured(attends, request):
            return speed.agreed_ms(context, work, attends, request)

        with open_context("cpu") as context:
            own = {"flex": 1.0 + context.rank, "sdpa": 1.5}
            speed.measure_ms = lambda attends, *rest: {name: own[name] for name in attends}
            print(choose("auto", request, measured))
            def fail(*arguments):
                raise KeyError("lost")
            speed.measure_ms = fail
            try:
                choose("auto", request, measured)
            except (KeyError, LostPeerError) as error:
                print(type(error).__name__)
    """
    (code, out, err), (other, shared, _) = run_two(script, tmp_path)
    assert (code, other) == (0, 0), err
    assert out.splitlines() == ["flex (1 ms; sdpa 1.5)", "KeyError"]
    assert shared.splitlines() == ["flex (1 ms; sdpa 1.5)", "LostPeerError"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "epigram", "train", "smoke", "--gpus", "2", "--device", "cpu", "--json"]
    settings = [argument for setting in SHORT for argument in ("--set", setting)]
    return subprocess.run(
        [*command, *settings, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_are_one(data_path: Path, tmp_path: Path):
    """Weights, moments and averages after 8 steps, the losses, the scores, through the whole job and torchrun."""
    # On the int6 grid a difference in the last bit can move a weight by a whole step, and gradients with it.
    smooth = (*FOUR_LANES, "schedule.qat_threshold=0")
    settings = [argument for setting in smooth for argument in ("--set", setting)]
    done = torchrun("--data", str(data_path), "--out", str(tmp_path / "two"), *settings)
    assert done.returncode == 0, done.stderr
    train_run(data_path, tmp_path / "one", *smooth)
    one, two = saved_tensors(tmp_path / "one"), saved_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        distance = torch.linalg.vector_norm((tensor - two[name]).double())
        assert distance <= 1e-5 * torch.linalg.vector_norm(tensor.double()), name
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5), "of all lanes"
    on_the_way = [[row["val_nats"] for row in rows_of(tmp_path / run) if "val_nats" in row] for run in ("one", "two")]
    assert len(on_the_way[0]) == 2
    assert on_the_way[1] == pytest.approx(on_the_way[0], rel=1e-5), "of one length, whatever a process trains at"
    alone, shared = result_of(tmp_path / "one"), result_of(tmp_path / "two")
    for model, methods in alone["scores"].items():
        for method, row in methods.items():
            found = shared["scores"][model][method]
            assert found["val_nats"] == pytest.approx(row["val_nats"], rel=1e-4)
            assert (found["tokens"], found["bytes"]) == (row["tokens"], row["bytes"])
    assert (shared["status"], shared["steps"]) == ("finished", 8)
    assert shared["paths"]["lanes"].endswith("2 process(es)")
    last = done.stdout.rstrip().splitlines()[-1]
    assert json.loads(last)["artifact_bytes"] == shared["artifact_bytes"]
    assert sum(line.startswith("{") for line in done.stdout.splitlines()) == 1, "one process prints"


def test_a_folder_that_one_cannot_use_ends_both(data_path: Path, finished: Path, tmp_path: Path):
    """Only the first process looks at it; without torchrun nobody would end the other."""
    script = """
        import sys
        from epigram.cli.main import main
        main()
    """
    (first, _, said), (second, _, also_said) = train_two(script, tmp_path, data_path, finished)
    assert (first, second) == (2, 2)
    assert said.startswith("epigram: rank 0: ")
    assert "is not empty" in said
    assert also_said == "", "one message, from where it happened"


def test_a_loss_that_is_no_number_on_one_ends_both_in_that_step(data_path: Path, tmp_path: Path):
    """And the run folder, which the first process writes, gives the reason."""
    script = f"""
        import math, sys
        from epigram.cli.main import main
        from epigram.run import train
        {FAULT_NOW}

        real = train.train_step

        def poisoned(session, plan):
            plain = session.lane_loss
            if plan.step == 3 and session.context.rank == 1:
                fault_now()
                session.lane_loss = lambda *a: plain(*a) * math.nan
            measured = real(session, plan)
            session.lane_loss = plain
            return measured

        train.train_step = poisoned
        main()
    """
    run = tmp_path / "run"
    said = said_at_the_end(script, tmp_path, data_path, run)
    assert said.count("step 4 gave a loss of nan and a gradient norm of nan in lane ") == 1, "one message"
    assert said.count("epigram: ") == 1
    assert "step 4 gave a loss of nan" in result_of(run)["reason"]


def test_a_bit_that_flips_in_one_process_stops_both(data_path: Path, tmp_path: Path):
    """The last bit of one weight: the next comparison names tensor and process, at the end if none comes before."""
    script = f"""
        import sys
        import torch
        from epigram.cli.main import main
        from epigram.run import train
        {FAULT_NOW}

        real = train.train_step

        def flipped(session, plan):
            measured = real(session, plan)
            if plan.step == 3 and session.context.rank == 1:
                fault_now()
                with torch.no_grad():
                    session.model.banks.up.view(-1)[5:6].view(torch.int32).bitwise_xor_(1)
            return measured

        train.train_step = flipped
        main()
    """
    run = tmp_path / "run"
    said = said_at_the_end(script, tmp_path, data_path, run)
    assert said.count("epigram: ") == 1
    assert "the processes' weights are no longer equal (banks.up on rank 1)" in said


FAULTS = {
    "exception": ("raise KeyError('own')", 2, "epigram: rank 1: KeyError: 'own'"),
    "in many words": ("raise KeyError('own' + 10_000 * '😀')", 2, "epigram: rank 1: KeyError: 'own"),
    "host memory": (
        "raise RuntimeError('[enforce] DefaultCPUAllocator: no 5 GiB')",
        2,
        "epigram: rank 1: out of memory ([enforce] DefaultCPUAllocator: no 5 GiB): take a smaller model",
    ),
    "memory": ("raise torch.OutOfMemoryError('no 5 GiB')", 2, "epigram: rank 1: out of memory (no 5 GiB)"),
    "killed": ("os.kill(os.getpid(), 9)", -9, "epigram: rank 1 was killed or lost"),
    "exit": ("sys.exit(7)", 7, None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_befalls_one_process_ends_all_with_one_message(data_path: Path, tmp_path: Path, fault: str):
    """Within seconds, with a code that is not 0; the run folder, which the first process writes, gives the cause."""
    happens, code, message = FAULTS[fault]
    script = f"""
        import os, sys
        import torch
        from epigram.cli.main import main
        {FAULT_NOW}
        from epigram.run import train

        real = train.train_step

        def faulty(session, plan):
            if plan.step == 3 and session.context.rank == 1:
                fault_now()
                {happens}
            return real(session, plan)

        train.train_step = faulty
        main()
    """
    run = tmp_path / "run"
    (first, _, said), (second, _, also_said) = train_two(script, tmp_path, data_path, run)
    assert seconds_since_fault(tmp_path) < MOST_S
    assert (first, second) == (2, code)
    if message is not None:
        assert [line for line in (said + also_said).splitlines() if line.startswith("epigram:")] != []
        assert (said + also_said).count("epigram: ") == 1
        assert message in said + also_said
    assert result_of(run)["status"] == "failed"
    assert "rank 1" in result_of(run)["reason"]


def test_who_looks_for_open_ports_is_no_process_of_the_run(tmp_path: Path):
    """Somebody who says something else, somebody who goes without a word: a failure is told all the same."""
    script = """
        import json, socket, sys, time
        from epigram.cli.main import main
        from epigram.dist import watch
        from epigram.dist.context import open_context

        try:
            with open_context("cpu") as context:
                if context.rank == 1:
                    place = next(iter(watch.current._peers)).getpeername()
                    for said in (b"GET / HTTP/1.1\\r\\n\\r\\n", b"[]\\n", b"7\\n", b'{"rank": 1}\\n', b""):
                        with socket.create_connection(place) as stranger:
                            stranger.sendall(said)
                    time.sleep(1)
                    raise OSError("torn cable")
                time.sleep(60)
        except ValueError as error:
            sys.exit(f"told: {error}")
    """
    (first, _, said), (second, _, _) = run_two(script, tmp_path)
    assert (first, second) == (2, 1)
    assert "Traceback" not in said


def test_a_process_that_waits_for_a_lost_one_is_ended(tmp_path: Path):
    """As in a collective on the device that never returns: the thread says the last words, and ends it."""
    script = """
        import sys, time
        from epigram.cli.main import main
        from epigram.dist import watch
        from epigram.dist.context import open_context

        watch.GRACE_S = 0.5
        try:
            with open_context("cpu") as context:
                if context.rank == 1:
                    raise OSError("torn cable")
                watch.current.last_words = lambda cause: print("last words:", cause, flush=True)
                time.sleep(60)
        except ValueError:
            sys.exit(3)
    """
    (first, out, said), (second, _, _) = run_two(script, tmp_path)
    assert (first, second) == (2, 3)
    assert out == "last words: rank 1: torn cable\n"
    assert said == "", "rank 1 has told"


def test_the_cause_is_told_and_not_who_heard_of_it_first(tmp_path: Path):
    """In a collective a process may learn that another failed before that one has said why."""
    script = """
        import sys, time
        from epigram.dist import collectives, watch
        from epigram.dist.context import open_context
        from epigram.errors import UserError

        real = watch.Watch.report

        def late(self, cause):
            time.sleep(1.0)
            return real(self, cause)

        try:
            with open_context("cpu") as context:
                if context.rank == 0:
                    watch.Watch.report = late
                with collectives.together(context):
                    if context.rank == 0:
                        raise OSError("torn cable")
        except UserError as error:
            print(type(error).__name__, error)
    """
    (_, out, err), (_, other, _) = run_two(script, tmp_path)
    assert (out, other) == ("UserError rank 0: torn cable\n", "LostPeerError rank 0: torn cable\n"), err


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 1)])
def test_a_run_goes_on_with_another_number_of_processes(data_path: Path, tmp_path: Path, before: int, after: int):
    """The same losses, weights and momenta as in one process that nobody interrupted, up to the order of sums.

    Of three processes the last has none of the four layers, and so no momentum.
    """
    run, whole = tmp_path / "run", tmp_path / "whole"
    smooth = (FOUR_LANES[0], "schedule.qat_threshold=0")  # as in test_two_processes_are_one
    settings = [argument for setting in smooth for argument in ("--set", setting)]
    script = """
        from epigram.cli.main import main
        main()
    """
    common = ("--device", "cpu", "--until", "train")
    first = run_two(
        script, tmp_path, "train", "smoke", "--data", str(data_path), "--out", str(run), *common,
        *[a for setting in SHORT for a in ("--set", setting)], *settings, "--set", "budget.max_steps=4",
        num_processes=before,
    )  # fmt: skip
    assert [code for code, _, _ in first] == [0] * before, first
    assert len(list((run / "checkpoints" / "step-00000004").glob("*.safetensors"))) == before, "each wrote its share"
    again = ("train", "--resume", str(run), *common, "--set", "budget.max_steps=0")
    second = run_two(script, tmp_path, *again, num_processes=after)
    assert [code for code, _, _ in second] == [0] * after, second
    train_run(data_path, whole, *smooth, until="train")
    assert losses_of(run) == pytest.approx(losses_of(whole), rel=1e-5)
    one, several = saved_tensors(whole), saved_tensors(run)
    assert one.keys() == several.keys()
    assert one["optimizer.muon.momentum.banks.up"].norm() > 0
    for name, tensor in one.items():
        distance = torch.linalg.vector_norm(tensor.double() - several[name].double())
        assert distance <= 1e-5 * torch.linalg.vector_norm(tensor.double()), name


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [(signal.SIGTERM, 143, "interrupted"), (signal.SIGINT, 130, "interrupted"), (signal.SIGUSR1, 0, None)],
)
def test_a_signal_to_one_process_is_heeded_by_both(data_path: Path, tmp_path: Path, number: int, code: int, status):
    script = f"""
        import os, signal
        from epigram.cli.main import main
        from epigram.run import train

        real = train.train_step

        def signalled(session, plan):
            if plan.step == 3 and session.context.rank == 1:
                os.kill(os.getpid(), {int(number)})
            return real(session, plan)

        train.train_step = signalled
        main()
    """
    run = tmp_path / "run"
    settings = [argument for setting in (*SHORT, FOUR_LANES[0]) for argument in ("--set", setting)]
    found = run_two(
        script, tmp_path, "train", "smoke", "--data", str(data_path), "--out", str(run), "--device", "cpu",
        "--until", "train", *settings,
    )  # fmt: skip
    assert [one for one, _, _ in found] == [code, code], found
    assert (run / "checkpoints" / "step-00000004").is_dir()
    assert result_of(run)["status"] == (status or "finished")
    if status:
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert f"stopped by {name} after step 4, whose checkpoint is complete" in result_of(run)["reason"]


def test_documents_that_are_late_on_one_process_end_the_score_on_both(finished: Path, data_path: Path, tmp_path: Path):
    """The second stops after its first chunk; the first, which reads on, hears of it when they add up."""
    script = """
        import sys
        from pathlib import Path
        from epigram.data.dataset import open_data
        from epigram.dist.context import open_context
        from epigram.evaluation.adapt_config import AdaptConfig, LoraConfig
        from epigram.evaluation.windows import Method
        from epigram.run.adapt import Adaptation, OverTimeError
        from epigram.run.setup import scoring_losses
        from epigram.run.weights import load_model

        data = open_data(sys.argv[2])
        with open_context("cpu") as context:
            model = load_model(Path(sys.argv[1]), "cpu").gpt
            lora = AdaptConfig(kind="lora", lora=LoraConfig(rank=2, chunk_tokens=16, num_documents=2))
            adaptation = Adaptation(
                config=lora, model=model, losses=scoring_losses(model, False, "auto", context), context=context,
                bos_id=data.tokenizer.bos_id, limit_s=1e-4 if context.rank else 1e4,
            )
            try:
                tokens = data.stream("val")[:501].copy()
                tokens[::60] = data.tokenizer.bos_id
                adaptation.score(
                    tokens, data.tokenizer.byte_tables(),
                    Method(name="sliding", seq_len=32, stride=16),
                    batch_tokens=128, expected_bytes=None, byte_counts=None, progress=False,
                )
            except OverTimeError as error:
                print("late:", error)
    """
    first, second = run_two(script, tmp_path, str(finished), str(data_path))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "late: another process would not be done" in first[1] and "raise score.adapt.lora.chunk_tokens" in first[1]
    assert re.search(r"late: .* was stopped after .* 0.0 s of budget.score_s were left", second[1])
