"""`epigram check --execute`: what a script does that it must not do, when it is run."""

import sys
import time
from pathlib import Path

import pytest
from check_helpers import LIMITS, another_script, change, count_script, found

from epigram.config import load_recipe, recipe_names, to_tree
from epigram.run.job import run_job
from epigram.run.submission import execute, guard
from epigram.run.submission.check import check

ENTRY = "    main(__file__)\n"


@pytest.fixture(autouse=True)
def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epigram.run.submission.check.probe", lambda path, kind: iter(()))


def of_running(folder: Path) -> dict[str, str]:
    return {rule: words for rule, words in found(folder, run_script=True).items() if rule.startswith("run.")}


def at_entry(folder: Path, code: str) -> None:
    change(folder / "train_gpt.py", ENTRY, f"{code}{ENTRY}")
    count_script(folder)


def test_a_script_that_calls_home(record: Path):
    another_script(record, "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)\n")
    assert set(of_running(record)) == {"run.network", "run.import"}


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess\nsubprocess.run(['curl', 'http://192.0.2.1/x'])",
        "import os\nos.system('curl http://192.0.2.1/x')",
        "import os\nos.spawnvp(os.P_WAIT, 'curl', ['curl', 'http://192.0.2.1/x'])",
        "import os\nos.posix_spawn('/usr/bin/curl', ['curl', 'http://192.0.2.1/x'], {})",
        "import subprocess\nsubprocess.run(['git', 'x'], executable='curl')",
        "import subprocess\nsubprocess.run(['git', 'clone', 'http://192.0.2.1/x'])",
        "from multiprocessing import util\nutil.spawnv_passfds(b'/usr/bin/curl', [b'curl'], [])",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-I', '-c', 'pass'])",
        "import ctypes\nctypes.CDLL(None).system(b'curl http://192.0.2.1/x')",
    ],
)
def test_a_script_that_lets_another_program_work(record: Path, code: str):
    """Also one that goes on as if nothing had happened."""
    body = "\n".join(f"    {line}" for line in code.splitlines())
    another_script(record, f"try:\n{body}\nexcept OSError:\n    pass\n")
    findings = of_running(record)
    assert set(findings) == {"run.process"} and "tried to start another program by" in findings["run.process"]


def test_what_a_script_asks_the_machine_is_let_through(record: Path):
    code = "import platform, subprocess\nplatform.processor()\nsubprocess.run(['git', 'status'], capture_output=True)\n"
    another_script(record, code)
    assert of_running(record) == {}


def test_another_script_is_imported_and_no_more(record: Path):
    another_script(record, "import torch\nif __name__ == '__main__':\n    raise SystemExit(1)\n")
    result = check(record, limits=LIMITS, run_script=True)
    rules = [row["rule"] for row in result["findings"] if row["rule"].startswith("run.")]
    assert rules == ["run.untested"]


def test_a_script_of_ours_that_cannot_train(record: Path):
    at_entry(record, "    if '--out' in sys.argv:\n        sys.exit('broken')\n")
    assert of_running(record) == {"run.train": "a tiny training run: broken"}


def test_a_script_of_ours_that_reads_at_scoring_what_it_must_not(record: Path, data_path: Path):
    """Real training shards, and what lies beside the artifact; it goes on when it is refused."""
    shard = next(data_path.glob("*train*.bin"))
    asks = [f"open({str(path)!r}, 'rb').read()" for path in (shard, record / "train_seed1.log")]
    asks.append(f"subprocess.run([{sys.executable!r}, __file__, '--recipe'])")
    tried = "".join(f"    try: {ask}\n    except OSError: pass\n" for ask in asks)
    at_entry(record, f"    import subprocess\n    if '--score' not in sys.argv: main(__file__)\n{tried}")
    findings = of_running(record)
    assert set(findings) == {"run.data", "run.process"}
    assert str(shard.resolve()) in findings["run.data"] and "train_seed1.log" in findings["run.data"]


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_script_started_ends_with_it(record: Path, tmp_path: Path, monkeypatch, goes_on: bool):
    """Whether its time is over or it ended by itself."""
    monkeypatch.setattr(execute, "LIMIT_S", 5 if goes_on else execute.LIMIT_S)
    sign = tmp_path / "sign"
    another_script(
        record,
        f"""import os, time
if os.fork() == 0:
    os.close(1)
    os.close(2)
    for _ in range(600):
        open({str(sign)!r}, "a").write("alive")
        time.sleep(0.05)
    os._exit(0)
while not os.path.exists({str(sign)!r}) or {goes_on}:
    time.sleep(0.05)
""",
    )
    said = of_running(record).get("run.import", "")
    assert said.endswith("it had not ended after 5 s") if goes_on else said == ""
    before = sign.stat().st_size
    time.sleep(0.5)
    assert sign.stat().st_size == before > 0


# -- the tiny setting --------------------------------------------------------------------------------------------------

FOR_GPUS = ("run.attention=flash4", "run.kernels=fused", "run.cuda_graphs=on")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_tiny_setting(name: str):
    adapted = ("score.methods=['sliding']", "score.adapt.kind=lora", "score.adapt.lora.chunk_tokens=128")
    made = [*FOR_GPUS, *adapted]
    tiny = load_recipe(name, [*made, *execute._tiny(to_tree(load_recipe(name, made)))])
    assert tiny.budget.steps == 2
    assert (tiny.run.attention, tiny.run.kernels, tiny.run.cuda_graphs) == ("auto", "auto", "auto")


@pytest.mark.parametrize("adapted", [("lora", 128), ("sgd", 32_768)])
def test_a_recipe_made_for_gpus_runs_in_the_tiny_setting(data_path: Path, tmp_path: Path, adapted: tuple[str, int]):
    """It names what only they have, and learns from chunks that are longer than the window, or all of the text."""
    kind, chunk = adapted
    recipe = [*FOR_GPUS, f"score.adapt.kind={kind}", f"score.adapt.{kind}.chunk_tokens={chunk}"]
    tree = to_tree(load_recipe("smoke", recipe))
    proto = (data_path / "tokenizer.model").read_bytes()
    data = execute._made_up(tmp_path / "data", proto, tree["model"]["vocab_size"])
    overrides = [*recipe, *execute._tiny(tree)]
    result = run_job("smoke", data_path=str(data), out=tmp_path / "run", overrides=overrides, device="cpu")
    assert f"adapted_{kind}" in result["scores"]["quantized"]
    score = load_recipe("smoke", overrides).score
    assert score.adapt.nothing_learned(execute._TOKENS["val"] - 1) is None


@pytest.mark.skipif(not guard.can_confine(), reason="this system has no Landlock")
def test_native_code_is_kept_from_the_same_files(record: Path, data_path: Path):
    """The reading of torch, of which Python's audit learns nothing, gets the artifact and no training shard."""
    shard = next(data_path.glob("*train*.bin")).resolve()
    at_entry(
        record,
        f"""    import torch
    if '--score' not in sys.argv: main(__file__)
    read = lambda path: torch.from_file(path, size=9, dtype=torch.uint8)
    read(sys.argv[sys.argv.index('--score') + 1])
    try: read({str(shard)!r})
    except RuntimeError: sys.exit('refused')
""",
    )
    findings = of_running(record)
    assert set(findings) == {"run.train"} and findings["run.train"].endswith("refused")
