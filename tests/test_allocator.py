"""Memory that is freed is kept, and not cleared again by the system."""

import platform
import subprocess
import sys

import pytest

# Page faults of a later use of 64 MB by PyTorch, which the system would have to clear in 16,384 small pages.
FAULTS = """
import resource, torch
from training.precision import pick_device
{choice}
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_large_blocks_are_cleared_once(kept):
    code = FAULTS.format(choice="pick_device('cpu')" if kept else "")
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert (faults < 100) == kept
