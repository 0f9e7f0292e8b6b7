"""Compile Triton kernels ahead of time for an H100, on any machine."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A driver that only knows its target, and launches that end at the compiler: it is the project's own calls that decide
# on types, alignments, blocks and warps. Tensors may stay on the CPU; their values are never computed. What the
# assembler reports is shown as it is written, since not every version of Triton can be asked to.
_PRELUDE = """
import subprocess

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Target:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Target())
launch = JITFunction.run
JITFunction.run = lambda self, *args, **kwargs: launch(self, *args, **{**kwargs, "warmup": True})

start = subprocess.run
def assemble(command, **options):
    done = start(command, **options)
    if "stderr" in options and hasattr(options["stderr"], "name"):
        with open(options["stderr"].name) as report:
            print(report.read(), flush=True)
    return done
subprocess.run = assemble
"""


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel: registers of a thread, bytes of them that spill to memory."""

    name: str
    registers: int
    spilled: int

    def fits(self, registers: int = 255) -> bool:
        """Whether nothing spills and no more registers are used.

        Blocks and tiles were chosen with Triton 3.6 to 3.9. With 3.3 to 3.5 three kernels spill up to 320 bytes, or one
        takes 180 registers where 168 are wanted: that is how their assemblers give out registers.
        """
        triton = importlib.import_module("triton")
        before = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)
        return self.spilled <= 320 * before and self.registers <= registers + 12 * before


def compiled(calls: str, cache: Path) -> list[Compiled]:
    """Every specialisation of the kernels that the Python statements `calls` launch. cache: an empty folder."""
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
    if "TRITON_PTXAS_PATH" not in os.environ and not any(tools.glob("ptxas*")):
        pytest.skip("Triton came without its assembler")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _PRELUDE + calls]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return [
        Compiled(name, int(registers), int(stored) + int(loaded))
        for name, stored, loaded, registers in re.findall(report, done.stdout, re.DOTALL)
    ]
