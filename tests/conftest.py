"""Shared test settings: Triton's interpreter without a GPU, and two threads at most, on laptops and servers alike."""

import importlib.util
import os

import pytest
import torch


def _interpret() -> None:
    """Have kernels interpreted, also by versions of Triton that are older than the NumPy they find.

    They count loops by int(array of one element), which NumPy 2.4 no longer allows.
    """
    # Read when `triton` is first imported, which `import torch` does not do. Each worker of pytest-xdist comes by here.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang_tensor

    def prepare_and_count(tensor, *scope):
        prepare(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = prepare_and_count


if not torch.cuda.is_available():
    _interpret()


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def fake_gpu(monkeypatch):
    """See the module `fake_gpu`: a function that gives a context in which tensors are fake."""
    from fake_gpu import fake_mode

    yield from fake_mode(monkeypatch)
