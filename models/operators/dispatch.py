"""What computes an operation: the one place that decides, by `model.backend` and by device.

`model.backend` names what computes the sparse convolution (`get_backend`). It is the one switch: with "torch_dense",
whose back end is `plain`, PyTorch computes every other operation too (`kernels`). It is no part of an architecture, but
set on a network that is built (`use_backend`).
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from models.operators import compiled, triton_support
from models.operators.sparse_conv.backend import Backend

if TYPE_CHECKING:  # each is what the protocol asks for
    from models.operators.sparse_conv import native, spconv, torch_dense, torchsparse
    from models.operators.sparse_conv.library import LibraryPlan

    _NATIVE: Backend[native.NativePlan] = native.NativeBackend()
    _TORCH_DENSE: Backend[torch_dense.DensePlan] = torch_dense.TorchDenseBackend()
    _TORCHSPARSE: Backend[LibraryPlan] = torchsparse.TorchSparseBackend.load()
    _SPCONV: Backend[LibraryPlan] = spconv.SpconvBackend.load()

# A constructor raises ImportError, saying how to install what it lacks, and ValueError where it cannot compute.
_BACKENDS = {
    "native": "sparse_conv.native:NativeBackend",
    "torch_dense": "sparse_conv.torch_dense:TorchDenseBackend",
    "torchsparse": "sparse_conv.torchsparse:TorchSparseBackend.load",
    "spconv": "sparse_conv.spconv:SpconvBackend.load",
}
BACKEND_NAMES = ("auto", *_BACKENDS)  # what model.backend may be
# Fastest first: "auto" takes the first that can be constructed here. The others, which compute on some devices or some
# convolutions only, are taken when asked for by name.
AUTOMATIC = ("native", "torch_dense")

_KERNELS = {
    ("convolution", "cpu"): "sparse_conv.cpu",
    ("convolution", "cuda"): "sparse_conv.triton_conv",
    ("enlarged convolution", "cuda"): "sparse_conv.triton_enlarged",
    ("nearest points", "cpu"): "knn.cpu_search",
    ("nearest points", "cuda"): "knn.triton_search",
    ("norm and MLP", "cuda"): "pointwise.triton_norm_mlp",
    ("transposition", "cpu"): "knn.cpu_search",
}


def get_backend(name: str) -> Backend[Any]:
    """The back end called `name`, or the fastest of `AUTOMATIC` when `name` is "auto" (which one is logged).

    Raises ValueError when there is no such back end, when it is not installed, or when it cannot compute here.
    """
    if name not in BACKEND_NAMES:
        raise ValueError(f"model.backend is {name!r}; accepted: {', '.join(BACKEND_NAMES)}")
    for candidate in AUTOMATIC if name == "auto" else (name,):
        module, constructor = _BACKENDS[candidate].split(":")
        try:
            backend = attrgetter(constructor)(_module(module))()
        except ImportError as error:
            missing = error
            continue
        if name == "auto":
            _announce(candidate)
        return backend
    raise ValueError(f"model.backend is {name!r}, which is not installed: {missing}") from missing


class BackendModule(nn.Module):
    """A module whose operations a back end computes, at first that of "auto". depthwise: whether some are such."""

    backend: Backend[Any]
    depthwise = False

    def __init__(self) -> None:
        super().__init__()
        self.backend = get_backend("auto")


Network = TypeVar("Network", bound=nn.Module)


def use_backend(network: Network, backend: str | Backend[Any]) -> Network:
    """The network itself, its operations computed by a back end, given by name or itself.

    Raises ValueError as `get_backend`, and when the back end lacks the depthwise convolutions of the network.
    """
    backend = get_backend(backend) if isinstance(backend, str) else backend
    for module in network.modules():
        if isinstance(module, BackendModule):
            if module.depthwise and not backend.depthwise:
                raise ValueError(f"model.depthwise_sparse is True; accepted: False with model.backend={backend.name}")
            module.backend = backend
    return network


def kernels(operation: str, device_type: str, plain: bool = False) -> ModuleType | None:
    """The module of this project's kernels for an operation, or None where PyTorch computes it.

    plain: that of the back end. Kernels for a GPU need Triton, those for a CPU a C compiler; where that is missing the
    answer is None too, with one warning in the log.
    """
    module = _KERNELS.get((operation, device_type))
    if plain or module is None:
        return None
    available = compiled.library() is not None if device_type == "cpu" else triton_support.available()
    return _module(module) if available else None


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"models.operators.{name}")


@lru_cache
def _announce(name: str) -> None:
    """Log the choice once, however many networks make it."""
    logging.getLogger(__name__).info("model.backend=auto: using %s", name)
