"""Compile the kernels for a Hopper GPU on any machine: a program, since the interpreter is chosen for a whole process.

The public functions are called as in training, on tensors of the CPU; Triton believes in a GPU, compiles what it would
launch there, with the same specialisations, and launches nothing. Prints a line of JSON for each kernel.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from epigram.kernels import muon, symmetric

TOOL = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


class Hopper:
    """As much of a driver as compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled(call: Callable[[], Any]) -> list[Any]:
    """The kernels that `call` would launch."""
    found, run = [], JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return found


def describe(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (where registers spill to), and tensor core instructions of Hopper."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, usage
    wgmma = len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"]))
    return {"registers": int(numbers[1]), "stack_bytes": int(numbers[2]), "wgmma": wgmma}


def calls() -> dict[str, Callable[[], Any]]:
    """What training calls, in the dtypes and shapes of parameter-golf #1212, and in float32."""
    found: dict[str, Callable[[], Any]] = {}
    for short, long, dtype in ((512, 1536, torch.bfloat16), (256, 512, torch.bfloat16), (512, 512, torch.float32)):
        x, gram = torch.empty(2, short, long, dtype=dtype), torch.empty(2, short, short, dtype=dtype)
        squares, name = torch.empty(2, short * long // 4096), f"of {short} x {long} in {dtype}"
        found |= {
            f"gram {name}": lambda x=x: symmetric.gram(x, fused=True),
            f"gram and norm {name}": lambda x=x, s=squares: symmetric.gram(x, s, fused=True),
            f"polynomial {name}": lambda gram=gram: symmetric.polynomial(gram, -4.775, 2.0315, fused=True),
            f"advance {name}": lambda x=x, gram=gram: symmetric.advance(x, gram, 3.4445, fused=True),
            f"advance and norm {name}": lambda x=x, gram=gram, s=squares: symmetric.advance(
                x, gram, 3.4, s, fused=True
            ),
        }
    bank, momentum = torch.empty(2, 1536, 512), torch.empty(2, 1536, 512, dtype=torch.bfloat16)
    update, transposed = torch.empty_like(momentum), torch.empty(2, 512, 1536, dtype=torch.bfloat16).mT
    squares, scalar, rates = torch.empty(2, muon.num_parts(1536, 512, fused=True)), torch.empty(()), torch.empty(2)
    for way, u in (("", update), (", transposed", transposed)):
        found |= {
            f"nesterov{way}": lambda u=u: muon.nesterov(bank, momentum, u, squares, scalar, scalar, fused=True),
            f"nesterov with rows{way}": lambda u=u: muon.nesterov(
                bank, momentum, u, squares, scalar, scalar, normalize=True, fused=True
            ),
            f"descend{way}": lambda u=u: muon.descend(bank, u, rates, rates, fused=True),
        }
    return found


def main() -> None:
    driver.set_active(Hopper())
    assert not triton.knobs.runtime.interpret
    for name, call in calls().items():
        for kernel in compiled(call):
            print(json.dumps({"call": name, "kernel": kernel.name, **describe(kernel)}), flush=True)


if __name__ == "__main__":
    main()
