"""The examination of a machine, on machines that lack something."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from epigram import plugin
from epigram.cli.doctor import command
from epigram.run import doctor, machine


def found(findings) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine(tmp_path):
    findings = doctor.examine(tmp_path)
    parts = {finding.part for finding in findings}
    assert {"software", "machine", "compiler", "storage", "optional libraries", "paths"} <= parts
    for finding in findings:
        assert (finding.status == "ok") == (finding.advice == ""), finding
    assert found(findings)["torch"].status == "ok"


def test_every_backend_is_asked():
    findings = found(doctor._attention("cpu", None, torch.float32))
    for name in plugin.names("epigram.attention"):
        for kind in ("full", "windowed"):
            assert f"{name}, {kind}" in findings
    assert findings["reference, full"].status == "ok"
    assert findings["attention, full"].value in plugin.names("epigram.attention")


def test_a_cpu_trains_in_float32():
    """A product in bfloat16 was measured 200 times slower on a CPU."""
    findings = found(doctor._paths())
    if findings["device"].value == "cpu":
        assert findings["precision"].value == "float32"


def test_no_backend_at_all_is_a_problem(monkeypatch):
    monkeypatch.setattr(plugin, "load", lambda package, name: SimpleNamespace(check=lambda request: "too old"))
    finding = found(doctor._attention("cpu", None, torch.float32))["attention, full"]
    assert (finding.value, finding.status) == ("none", "problem")
    assert "too old" in finding.advice


def test_what_cannot_be_used_says_why(monkeypatch):
    def check(request):
        return f"heads of {request.head_dim} on {request.device_type} are too much" if request.window else None

    monkeypatch.setattr(plugin, "load", lambda package, name: SimpleNamespace(check=check, attend=None))
    findings = found(doctor._attention("cpu", None, None))
    assert findings["sdpa, full"].status == "ok"
    assert findings["sdpa, windowed"].value == "not usable here"
    assert findings["sdpa, windowed"].advice == "heads of 64 on cpu are too much"


def test_a_broken_library_is_a_finding_and_no_crash(monkeypatch):
    def broken(package, name):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(plugin, "load", broken)
    assert "libcudart" in doctor._why_not("sdpa", None)


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = found(doctor._compiler())["C++ compiler"]
    assert (finding.value, finding.status) == ("none", "note")
    assert "install g++" in finding.advice


def test_programs_in_the_temp_folder_run(tmp_path):
    assert doctor.why_not_executable(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_temp_folder_without_execution(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.subprocess, "run", refuse)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    finding = found(doctor._storage(tmp_path))["temp folder"]
    assert finding.status == "problem"
    assert "TMPDIR" in finding.advice
    assert list(tmp_path.iterdir()) == []


def test_a_real_mount_without_execution(tmp_path):
    """In a mount namespace of its own, which ends with the process."""
    ask = f"from epigram.run import doctor as d; print(d.why_not_executable(d.Path({str(tmp_path)!r})))"
    script = f'mount -t tmpfs -o noexec,size=64k tmpfs {tmp_path} || exit 77; exec {sys.executable} -c "{ask}"'
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("needs the right to mount")
    assert done.stdout.strip() == "programs in it may not run (Permission denied)", done.stderr


def test_a_full_disk_and_a_folder_yet_to_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**9))
    finding = found(doctor._storage(tmp_path / "runs" / "one"))["run folder"]
    assert finding.value.startswith(str(tmp_path))
    assert (finding.status, "free space" in finding.advice) == ("note", True)


def test_gpus_without_fast_bfloat16(monkeypatch):
    old = {"name": "Tesla T4", "capability": [7, 5], "memory_bytes": 16 << 30}
    new = {"name": "NVIDIA H100", "capability": [9, 0], "memory_bytes": 80 << 30}
    monkeypatch.setattr(machine, "gpus", lambda: [old, new])
    findings = found(doctor._gpus())
    assert findings["GPU 0"].status == "note"
    assert findings["GPU 1"].value == "NVIDIA H100, capability 9.0, 80 GiB"
    assert findings["GPU 1"].status == "ok"


def test_a_driver_that_torch_cannot_use_is_told_from_no_gpu(monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "580.159")
    assert "driver" in found(doctor._gpus())["GPU"].advice
    monkeypatch.setattr(machine, "nvidia_driver", lambda: None)
    assert "demo" in found(doctor._gpus())["GPU"].advice


def test_too_few_threads(monkeypatch):
    monkeypatch.setattr(machine, "cpu_count", lambda: 16)
    monkeypatch.setattr(machine, "thread_count", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    finding = found(doctor._hardware())["threads"]
    assert finding.value == "1 (OMP_NUM_THREADS=1)"
    assert "1 of 16" in finding.advice


PROBLEM = doctor.Finding(part="storage", name="temp folder", value="/tmp", status="problem", advice="set TMPDIR")
FINE = doctor.Finding(part="software", name="torch", value="2.13.0")


@pytest.mark.parametrize(("findings", "code"), [([FINE], 0), ([FINE, PROBLEM], 1)])
def test_command(monkeypatch, findings, code):
    monkeypatch.setattr(doctor, "examine", lambda folder: findings)
    shown = CliRunner().invoke(command, [])
    assert shown.exit_code == code
    for finding in findings:
        assert finding.value in shown.output
        assert finding.advice in shown.output
    printed = CliRunner().invoke(command, ["--json"])
    assert printed.exit_code == code
    document = json.loads(printed.output.splitlines()[-1])
    assert document == {"problems": code, "findings": [finding.as_dict() for finding in findings]}
