"""A GPU that is not there: fake tensors carry a device, a type and a shape, and refuse to hand out values.

Code that runs on them mixes no devices and reads nothing back, which any machine can show.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import subsets
from diffusion.process import DiffusionProcess
from models import interpolation
from models.operators.knn import search as knn
from models.operators.sparse_conv import backend
from runtime.precision import Precision


def _can_pretend() -> bool:
    """Whether fake tensors on a GPU can be computed with where there is none; PyTorch 2.7 asks the driver."""
    try:
        with FakeTensorMode():
            places = torch.zeros(1, dtype=torch.int64, device="cuda")
            return torch.zeros(2, device="cuda")[places].device.type == "cuda"
    except RuntimeError:
        return False


can_pretend = pytest.mark.skipif(not _can_pretend(), reason="fake tensors need a driver in this PyTorch")


def fake_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], FakeTensorMode]]:
    """A context in which tensors are fake. What the host makes once and keeps it makes in earnest."""

    def for_the_device(function):
        def table(*arguments):
            with unset_fake_temporarily():
                made = function(*arguments[:-1], torch.device("cpu"))
            if arguments[-1].type == "cpu":
                return made
            parts = made if isinstance(made, tuple) else (made,)
            parts = [torch.empty(part.shape, dtype=part.dtype, device=arguments[-1]) for part in parts]
            if hasattr(made, "_fields"):
                return type(made)(*parts)
            return parts if isinstance(made, tuple) else parts[0]

        return table

    monkeypatch.setattr(knn, "_most_tied", lambda *_: knn._MOST_TIED)  # read from a table on the host
    tables = [(knn, name) for name in ("_columns", "_nearest_on_full_lattice")]
    tables += [(interpolation, name) for name in ("_full_lattice_reads", "_full_lattice_averages")]
    for module, name in [*tables, (backend, "_on_full_lattice"), (subsets, "_sequence")]:
        monkeypatch.setattr(module, name, for_the_device(getattr(module, name)))
    respaced = DiffusionProcess.respaced

    def respaced_on_the_host(process, kept):
        with unset_fake_temporarily():
            return respaced(process, kept)

    monkeypatch.setattr(DiffusionProcess, "respaced", respaced_on_the_host)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # a matter of the driver
    monkeypatch.setattr(Precision, "autocast", lambda precision: autocast(precision.device.type, precision.dtype))
    with contextlib.suppress(ImportError):
        from models.operators.pointwise import triton_norm_mlp as triton_pointwise

        monkeypatch.setattr(triton_pointwise, "_shared_memory", lambda device: 227 * 1024)  # of an H100; it is asked
    _forget()
    yield lambda: FakeTensorMode(allow_non_fake_inputs=True)
    _forget()


def _forget() -> None:
    """Empty all caches of the project: what one context leaves there is of no use to another."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("diffusion", "models"):
            for function in vars(module).values():
                if callable(getattr(function, "cache_clear", None)):
                    function.cache_clear()


def moved(network: nn.Module, place: str = "cuda") -> nn.Module:
    """The network with parameters on a device, which on a fake one have no values."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.rand(p.shape, dtype=p.dtype, device=place), p.requires_grad))
    return network


@contextlib.contextmanager
def autocast(place: str, dtype: torch.dtype):
    """`torch.autocast`, which switches itself off where there is no GPU."""
    before = torch.is_autocast_enabled(place), torch.get_autocast_dtype(place)
    torch.set_autocast_enabled(place, True)
    torch.set_autocast_dtype(place, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(place, before[0])
        torch.set_autocast_dtype(place, before[1])


class Waits(TorchDispatchMode):
    """Counts the copies from the host to the device that the host waits for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        out = operator(*arguments, **keywords)
        if operator is torch.ops.aten._to_copy.default and not keywords.get("non_blocking"):
            self.count += out.device.type == "cuda" and arguments[0].device.type == "cpu"
        return out
