"""Which kernels compute an operation: the one place that decides, by device and by `model.backend`."""

from __future__ import annotations

import importlib
from types import ModuleType

from models.operators import compiled, triton_support

_HERE = "models.operators"
_KERNELS = {
    ("convolution", "cpu"): f"{_HERE}.sparse_conv.cpu",
    ("convolution", "cuda"): f"{_HERE}.sparse_conv.triton_conv",
    ("enlarged convolution", "cuda"): f"{_HERE}.sparse_conv.triton_enlarged",
    ("nearest points", "cpu"): f"{_HERE}.knn.cpu_search",
    ("nearest points", "cuda"): f"{_HERE}.knn.triton_search",
    ("norm and MLP", "cuda"): f"{_HERE}.pointwise.triton_norm_mlp",
    ("transposition", "cpu"): f"{_HERE}.knn.cpu_search",
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
