"""`epigram check --execute`: what a script does that it must not do, when it is run."""

import sys
from pathlib import Path

import pytest
from check_helpers import LIMITS, another_script, change, count_script, found

from epigram.run.submission import guard
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
