"""Shared test settings: Triton's interpreter without a GPU, and two threads at most, on laptops and servers alike."""

import os

import pytest
import torch

# Read when `triton` is first imported, which `import torch` does not do. Each worker of pytest-xdist comes by here.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))
