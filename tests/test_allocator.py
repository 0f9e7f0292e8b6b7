"""Memory that is freed is kept, and not cleared again by the system."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a later use of 64 MB by PyTorch, which the system would have to clear in 16,384 small pages.
FAULTS = """
import resource, torch
from runtime.allocator import release_freed_memory
from runtime.precision import pick_device
{choice}
for _ in range(30):
    {each}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(
    ("choice", "each", "kept"),
    [("", "", False), ("pick_device('cpu')", "", True), ("pick_device('cpu')", "release_freed_memory()", False)],
)
def test_large_blocks_are_cleared_once(choice, each, kept):
    code = FAULTS.format(choice=choice, each=each)
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}  # one fault would clear a large page
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 100) == kept
