"""Back ends of the sparse convolution, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

from models.operators.sparse_conv.backend import Backend
from models.operators.sparse_conv.native import NativeBackend
from models.operators.sparse_conv.spconv import SpconvBackend
from models.operators.sparse_conv.torch_dense import TorchDenseBackend
from models.operators.sparse_conv.torchsparse import TorchSparseBackend
from models.operators.sparse_conv.warpconvnet import WarpConvNetBackend

# A constructor raises ImportError, saying how to install what it lacks, and ValueError where it cannot compute.
BACKENDS: dict[str, Callable[[], Backend]] = {
    "native": NativeBackend,
    "torch_dense": TorchDenseBackend,
    "torchsparse": TorchSparseBackend.load,
    "spconv": SpconvBackend.load,
    "warpconvnet": WarpConvNetBackend.load,
}
# Fastest first: "auto" takes the first that can be constructed here. The others, which compute on some devices or some
# convolutions only, are taken when asked for by name.
AUTOMATIC = ("native", "torch_dense")


def get_backend(name: str) -> Backend:
    """The back end called `name`, or the fastest of `AUTOMATIC` when `name` is "auto" (which one is logged).

    Raises ValueError when there is no such back end, when it is not installed, or when it cannot compute here.
    """
    if name == "auto":
        return _fastest()
    if name not in BACKENDS:
        raise ValueError(f"model.backend is {name!r}; it must be one of {', '.join(['auto', *BACKENDS])}")
    try:
        return BACKENDS[name]()
    except ImportError as error:
        raise ValueError(f"model.backend is {name!r}, which is not installed: {error}") from error


def _fastest() -> Backend:
    for name in AUTOMATIC:
        try:
            backend = BACKENDS[name]()
        except ImportError:
            continue
        _announce(name)
        return backend
    raise RuntimeError("no back end of the sparse convolution could be constructed")


@lru_cache
def _announce(name: str) -> None:
    """Log the choice once, however many networks make it."""
    logging.getLogger(__name__).info("model.backend=auto: using %s", name)
