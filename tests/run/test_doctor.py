"""The examination of a machine, on machines that lack something."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from epigram import capability, plugin
from epigram.cli.main import command
from epigram.run import choices, doctor, machine


def found(findings) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine(tmp_path):
    findings = doctor.examine(tmp_path)
    parts = {finding.part for finding in findings}
    assert {"software", "machine", "compiler", "storage", "optional libraries", "paths"} <= parts
    for finding in findings:
        assert (finding.status == "ok") == (finding.advice == ""), finding
    assert found(findings)["torch"].status == "ok"


@pytest.fixture
def no_flash(shipped_backends, monkeypatch):
    """No FlashAttention library, a cuDNN that is recent, Triton and a compiler."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("flash3", "flash4"):
        monkeypatch.delitem(sys.modules, f"epigram.attention.{name}", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(capability, "triton_installed", lambda: True)
    monkeypatch.setattr(choices, "compiler_available", lambda: True)


def explained(device_type, found=None) -> dict[str, str]:
    """Value and advice of each finding, as one text."""
    findings = doctor.explain("paths", "it", device_type, found)
    return {f.name: f.value + (f" | {f.advice}" if f.advice else "") for f in findings}


def test_every_backend_is_explained(no_flash):
    findings = explained("cpu")
    hopper, blackwell = (capability.support("cuda", found).device for found in ((9, 0), (10, 0)))
    for name in plugin.names("epigram.attention"):
        for kind in ("full", "windowed"):
            assert f"{name}, {kind}" in findings
    assert findings == {
        "device": "it",
        "precision": f"float32: {capability.support('cpu').precision_reason}",
        "compile": "on: torch.compile writes C++ for it",
        "Triton kernels": "off: Triton compiles for GPUs; on a CPU its interpreter is for tests",
        "float8 products": "off unless run.float8=true, rounded and multiplied in float32: slower than without",
        **{
            f"{name}, {kind}": words
            for kind in ("full", "windowed")
            for name, words in {
                "attention": "sdpa: the other backends need CUDA",
                "sdpa": "used",
                "reference": "usable, but slow: it is what the others are tested against",
                "flash3": f"not usable here | flash3 is not for CPUs, only for {hopper}",
                "flash4": f"not usable here | flash4 is not for CPUs, only for {blackwell} and {hopper}",
                "flex": "not usable here | flex attention is for CUDA devices; sdpa is right here",
                "cudnn": "not usable here | cudnn is for CUDA devices",
            }.items()
        },
    }


def test_a_v100_and_a_t4(no_flash):
    for found, said in (((7, 0), "7.0"), ((7, 5), "7.5")):
        findings = explained("cuda", found)
        assert findings["device"] == "it: one of the Volta and Turing GPUs (V100, T4, RTX 20 series)"
        assert findings["precision"] == (
            "float32: the first tensor cores multiply float16 alone, which is unsafe for training without scaling the "
            "loss; bfloat16 is emulated there"
        )
        assert findings["compile"] == "on: torch.compile supports compute capability 7.0 and later"
        assert findings["Triton kernels"].startswith("off: Triton supports compute capability 8.0 and later")
        for kind in ("full", "windowed"):
            assert findings[f"attention, {kind}"] == (
                "sdpa: sdpa has a memory-efficient kernel for float32; flash and flex kernels need Ampere"
            )
            assert findings[f"sdpa, {kind}"] == "used"
            assert findings[f"cudnn, {kind}"].endswith(f"cudnn needs compute capability 8.0, this device has {said}")
            assert "needs compute capability 8.0" in findings[f"flex, {kind}"]
            assert "is not for Volta and Turing" in findings[f"flash4, {kind}"]


@pytest.mark.parametrize("found", [(8, 0), (8, 9), (12, 0)])
def test_an_a100_a_4090_and_a_5090(no_flash, found):
    findings = explained("cuda", found)
    assert findings["precision"].startswith("bfloat16: ") and "multipl" in findings["precision"]
    assert findings["Triton kernels"] == "on: Triton supports compute capability 8.0 and later"
    measured = "measured when a run starts"
    assert findings["attention, full"].startswith(f"the fastest of sdpa, cudnn, {measured}: ")
    assert findings["attention, windowed"].startswith(f"the fastest of flex, sdpa, {measured}: ")
    assert findings["attention, windowed"].endswith("flex leaves out whole tiles beyond a window")
    assert findings["flex, windowed"] == "usable: taken where it is the fastest"
    assert findings["flex, full"] == "usable, but sdpa comes first on this device"
    assert findings["cudnn, windowed"] == "not usable here | cudnn has no windows through torch"
    assert "flash4 is not for" in findings["flash4, full"]


def test_an_h100_without_and_with_libraries(no_flash, monkeypatch):
    findings = explained("cuda", (9, 0))
    assert findings["device"] == "it: one of the Hopper GPUs (H100, H200)"
    assert findings["attention, full"].startswith("the fastest of cudnn, sdpa, measured")
    assert findings["flash4, full"].endswith("pip install 'epigram[flash4]'")
    assert "build it from source" in findings["flash3, windowed"]
    load = plugin.load

    def with_flash(package, name):
        return (
            SimpleNamespace(check=lambda request: None, attend=None)
            if name in ("flash3", "flash4")
            else load(package, name)
        )

    monkeypatch.setattr(plugin, "load", with_flash)
    findings = explained("cuda", (9, 0))
    assert findings["attention, full"].startswith("the fastest of flash4, flash3, cudnn, sdpa, measured")
    assert findings["attention, windowed"].startswith("the fastest of flash4, flash3, sdpa, measured")
    assert findings["flash4, windowed"] == "usable: taken where it is the fastest"


def test_a_b200(no_flash):
    findings = explained("cuda", (10, 0))
    assert findings["flash4, full"].endswith("pip install 'epigram[flash4]'")
    assert findings["flash3, full"] == (
        "not usable here | flash3 is not for Blackwell data-center GPUs (B200, GB200), "
        "only for Hopper GPUs (H100, H200)"
    )


def test_a_mac(no_flash):
    findings = explained("mps")
    assert findings["precision"].startswith("float32: float16 is unsafe for training without scaling the loss")
    assert findings["compile"] == "off: torch's compiler for MPS is a prototype"
    assert findings["Triton kernels"] == "off: Triton has no backend for MPS"
    assert findings["attention, windowed"] == "sdpa: the other backends need CUDA"


def test_without_triton_or_a_compiler(no_flash, monkeypatch):
    monkeypatch.setattr(choices, "compiler_available", lambda: False)
    findings = explained("cuda", (9, 0))
    assert findings["compile"] == "off: there is no C++ compiler, or Python's headers are missing"
    assert "only where it is compiled" in findings["flex, windowed"]
    assert findings["attention, windowed"].startswith("sdpa: ")
    monkeypatch.setattr(capability, "triton_installed", lambda: False)
    findings = explained("cuda", (9, 0))
    assert findings["compile"] == "off: torch.compile needs Triton for CUDA devices, which is not installed"
    assert findings["Triton kernels"].startswith("off: Triton is not installed")


def test_each_kind_of_gpu_is_explained(no_flash, monkeypatch):
    def gpu(name, *found):
        return {"name": name, "capability": list(found), "memory_bytes": 16 << 30}

    monkeypatch.setattr(
        machine, "gpus", lambda: [gpu("Tesla T4", 7, 5), gpu("NVIDIA H100", 9, 0), gpu("Tesla T4", 7, 5)]
    )
    precision = {f.part: f.value.split(":")[0] for f in doctor._paths() if f.name == "precision"}
    assert precision == {"paths on NVIDIA H100": "bfloat16", "paths on Tesla T4": "float32"}
    monkeypatch.setattr(machine, "gpus", lambda: [gpu("NVIDIA H100", 9, 0)] * 8)
    assert {f.part for f in doctor._paths()} == {"paths"}


def test_no_backend_at_all_is_a_problem(monkeypatch):
    monkeypatch.setattr(plugin, "load", lambda package, name: SimpleNamespace(check=lambda request: "too old"))
    finding = found(doctor.explain("paths", "cpu", "cpu", None))["attention, full"]
    assert (finding.value, finding.status) == ("none", "problem")
    assert "sdpa: too old" in finding.advice


def test_what_cannot_be_used_says_why(monkeypatch):
    def check(request):
        return f"heads of {request.head_dim} on {request.device_type} are too much" if request.window else None

    monkeypatch.setattr(plugin, "load", lambda package, name: SimpleNamespace(check=check, attend=None))
    findings = found(doctor.explain("paths", "cpu", "cpu", None))
    assert findings["sdpa, full"].status == "ok"
    assert findings["flex, full"].value == "usable, but sdpa comes first on this device"
    assert findings["sdpa, windowed"].value == "not usable here"
    assert findings["sdpa, windowed"].advice == "heads of 64 on cpu are too much"


def test_a_broken_library_is_a_finding_and_no_crash(monkeypatch):
    def broken(name):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(plugin.importlib, "import_module", broken)
    monkeypatch.setattr(plugin, "names", lambda package: ["flash4", "sdpa"])
    finding = found(doctor.explain("paths", "it", "cuda", (9, 0)))["flash4, full"]
    assert (finding.value, finding.status) == ("not usable here", "note")
    assert "does not load (libcudart.so.13: cannot open shared object file)" in finding.advice


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
    assert "float32" in findings["GPU 0"].advice
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
    shown = CliRunner().invoke(command, ["doctor"])
    assert shown.exit_code == code
    for finding in findings:
        assert finding.value in shown.output
        assert finding.advice in shown.output
    printed = CliRunner().invoke(command, ["doctor", "--json"])
    assert printed.exit_code == code
    document = json.loads(printed.output.splitlines()[-1])
    assert document == {"problems": code, "findings": [finding.as_dict() for finding in findings]}
