"""What the back ends on libraries of sparse convolutions share.

Such a library convolves the rows of one feature matrix, finding neighbours by integer coordinates; it knows nothing of
densities. The order of its coordinate columns and taps is a convention that changed between versions, and a wrong
order raises nothing, it mixes images or mirrors kernels. So a small example is compared with `torch_dense` when a back
end is first made. Letters: B batch, C channels, M points, N = B·M rows, K taps.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from diffusion.coordinates import Points, Size
from diffusion.random import Purpose, stream
from models.operators.sparse_conv.backend import (
    Backend,
    Plan,
    Span,
    check_features,
    check_points,
    inverse_density,
    normalised,
    resample_kernel,
)
from models.operators.sparse_conv.torch_dense import TorchDenseBackend

# Part of the largest number; TF32, which libraries use for float32 on GPUs, stays below, a wrong order far above.
_TOLERANCE = 1e-2
_SIZE, _KERNEL_SHAPE, _CHANNELS = (6, 7), (3, 5), 8  # of the example


@dataclass(frozen=True, eq=False)
class LibraryPlan(Plan):
    """`Plan` with what the library keeps of the points: its own type."""

    geometry: Any


@dataclass(frozen=True, kw_only=True)
class LibraryBackend(ABC):
    """Implements `models.operators.sparse_conv.backend.Backend` on a library; made by `load`.

    device_type: where the library computes. depthwise, gradients: whether it does depthwise convolutions, and backward
    passes. Features of a precision not in `dtypes` are convolved in float32.
    """

    device_type: str
    depthwise: bool
    gradients: bool = True

    name: ClassVar[str]
    plain: ClassVar[bool] = False
    install: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16)

    @classmethod
    def load(cls) -> LibraryBackend:
        """The back end, its library's conventions checked once per process.

        Raises ImportError when the library is not installed, ValueError when it cannot compute here.
        """
        if importlib.util.find_spec(cls.name) is None:
            raise ImportError(cls.install)
        backend = cls._open()
        with torch.device("cpu"):  # also where networks are built without memory, on the meta device
            check_conventions(backend)
        return backend

    @classmethod
    def require_cuda(cls) -> str:
        """The device type "cuda", or ValueError where there is none."""
        if not torch.cuda.is_available():
            raise ValueError(
                f"model.backend is {cls.name!r}, which computes on CUDA only; accepted: native, torch_dense"
            )
        return "cuda"

    @classmethod
    @abstractmethod
    def _open(cls) -> LibraryBackend:
        """Import the library and find out what it can do."""

    @abstractmethod
    def _geometry(self, coordinates: torch.Tensor, batch: int, size: Size, kernel_shape: Size) -> Any:
        """What the library keeps of the points. `coordinates`: int32 (N, 3), (image, row, column), by image."""

    @abstractmethod
    def _convolve(self, rows: torch.Tensor, kernel: torch.Tensor, plan: LibraryPlan, depthwise: bool) -> torch.Tensor:
        """Cross-correlation of rows (N, C) with a kernel (C_out, C/groups, k'_h, k'_w): (N, C_out)."""

    def plan(
        self,
        points: Points,
        batch: int,
        kernel_shape: Size,
        kernel_size: int,
        device: torch.device,
        span: Span | None = None,
    ) -> LibraryPlan:
        if device.type != self.device_type:
            raise ValueError(
                f"run.device is {device.type}; accepted: {self.device_type}, "
                f"where model.backend={self.name} as installed computes"
            )
        check_points(points, batch, device)
        rows, cols = points.rows_cols(device)
        image = torch.arange(batch, device=device)[:, None]
        coordinates = torch.stack(torch.broadcast_tensors(image, rows, cols), dim=2).flatten(0, 1).int()  # (N, 3)
        geometry = self._geometry(coordinates, batch, points.size, kernel_shape)
        density = inverse_density(points, kernel_shape, kernel_size, device, span)
        return LibraryPlan(points, batch, kernel_shape, density, geometry, span=span)

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: LibraryPlan,
        groups: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_features(x, weight, plan, groups, residual)
        self._check_support(x, weight, groups)
        device_type, dtype, depthwise = x.device.type, x.dtype, groups > 1
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        inner = dtype if dtype in self.dtypes else torch.float32
        kernel = resample_kernel(weight, plan.kernel_shape, plan.span).to(inner)
        with torch.autocast(device_type, enabled=False):  # the libraries' own rules for it differ
            rows = x.flatten(0, 1).to(inner)
            if plan.kernel_shape == (1, 1):  # each library has another layout for this one
                taps = kernel.flatten(1)  # (C_out, C/groups)
                out = rows * taps[:, 0] if depthwise else rows @ taps.t()
            else:
                out = self._convolve(rows, kernel, plan, depthwise)
        out = normalised(out.unflatten(0, (plan.batch, -1)), plan, None).to(dtype)  # (B, M, C_out)
        return out if residual is None else residual + out

    def _check_support(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> None:
        if groups != 1 and not groups == x.shape[2] == weight.shape[0]:
            raise ValueError(
                f"groups is {groups}, of {x.shape[2]} channels to {weight.shape[0]}; "
                f"accepted: 1, or one per channel, with model.backend={self.name}"
            )
        if groups != 1 and not self.depthwise:
            raise ValueError(
                f"groups is {groups}; accepted: 1, as model.backend={self.name} has no depthwise convolutions"
            )
        if not self.gradients and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            raise ValueError(f"model.backend is {self.name!r} without gradients; accepted: native, torch_dense")


@lru_cache
def check_conventions(backend: LibraryBackend) -> None:
    """Raise ValueError unless a library agrees with `torch_dense` on two images with other points, in any order.

    Neither lattice nor kernel is square, and no two taps are alike. Gradients are compared too, if there are any.
    """
    generator = stream(0, Purpose.SELF_CHECK)
    index = torch.stack([torch.randperm(_SIZE[0] * _SIZE[1], generator=generator)[:15] for _ in range(2)])
    for groups in (1, _CHANNELS) if backend.depthwise else (1,):
        weight = torch.randn(_CHANNELS, _CHANNELS // groups, *_KERNEL_SHAPE, generator=generator)
        x, dout = (torch.randn(2, index.shape[1], _CHANNELS, generator=generator) for _ in range(2))
        inputs = (index, x, weight, dout, groups)
        expected = _example(TorchDenseBackend(), "cpu", True, *inputs)
        try:
            found = _example(backend, backend.device_type, backend.gradients, *inputs)
        except Exception as error:  # whatever a library raises, the user's line must name it
            raise ValueError(
                f"model.backend is {backend.name!r}, which failed on a small example: {type(error).__name__}: {error}"
            ) from error
        for what, a, b in zip(("a result", "a gradient of features", "a gradient of kernels"), found, expected):
            difference = ((a - b).abs().max() / b.abs().max()).item()
            if not difference <= _TOLERANCE:
                raise ValueError(
                    f"model.backend is {backend.name!r}, which on a small example gives {what} {difference:.1e} off "
                    "that of torch_dense: the order of its coordinates or taps is not a known one"
                )


def _example(
    backend: Backend[Any],
    device_type: str,
    gradients: bool,
    index: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    dout: torch.Tensor,
    groups: int,
) -> tuple[torch.Tensor, ...]:
    """Result and, with `gradients`, gradients of x and weight, on the CPU."""
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast(device_type, enabled=False):
        index, dout = index.to(device_type), dout.to(device_type)
        x, weight = (tensor.to(device_type, copy=True).requires_grad_(gradients) for tensor in (x, weight))
        plan = backend.plan(Points(_SIZE, index), len(index), _KERNEL_SHAPE, 3, index.device)
        out = backend.conv(x, weight, plan, groups)
        found = (out, *torch.autograd.grad(out, (x, weight), dout)) if gradients else (out,)
    return tuple(tensor.detach().cpu() for tensor in found)
