"""Which kernels compute an operation: the one place that decides, by device and by `model.backend`."""

from __future__ import annotations

import importlib
from types import ModuleType

from models import triton_support
from models.operators.native import compiled

_NATIVE = "models.operators.native"
_KERNELS = {
    ("convolution", "cpu"): f"{_NATIVE}.cpu",
    ("convolution", "cuda"): f"{_NATIVE}.triton_conv",
    ("enlarged convolution", "cuda"): f"{_NATIVE}.triton_enlarged",
    ("nearest points", "cpu"): f"{_NATIVE}.cpu_neighbours",
    ("nearest points", "cuda"): "models.triton_neighbours",
    ("norm and MLP", "cuda"): f"{_NATIVE}.triton_pointwise",
    ("transposition", "cpu"): f"{_NATIVE}.cpu_neighbours",
}


def kernels(operation: str, device_type: str, plain: bool = False) -> ModuleType | None:
    """The module of this project's kernels for an operation, or None where PyTorch computes it.

    plain: compute everything in PyTorch, as `model.backend=torch_dense` asks. Kernels for a GPU need Triton, those for
    a CPU a C compiler; where that is missing the answer is None too, with one warning in the log.
    """
    module = _KERNELS.get((operation, device_type))
    if plain or module is None:
        return None
    available = compiled.library() is not None if device_type == "cpu" else triton_support.available()
    return importlib.import_module(module) if available else None
