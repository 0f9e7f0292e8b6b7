"""Compile Triton kernels ahead of time for an H100, on any machine."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A driver that only knows its target, and launches that end at the compiler: it is the project's own calls that decide
# on types, alignments, blocks and warps. Tensors may stay on the CPU; their values are never computed.
_PRELUDE = """
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
"""


@dataclass(frozen=True)
class Compiled:
    """What the assembler says of a kernel: registers of a thread, bytes of them that spill to memory."""

    name: str
    registers: int
    spilled: int


def compiled(calls: str, cache: Path) -> list[Compiled]:
    """Every specialisation of the kernels that the Python statements `calls` launch. cache: an empty folder."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DUMP_PTXAS_LOG": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", _PRELUDE + calls]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return [
        Compiled(name, int(registers), int(stored) + int(loaded))
        for name, stored, loaded, registers in re.findall(report, done.stdout, re.DOTALL)
    ]
