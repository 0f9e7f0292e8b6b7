"""The native back end: sums over the present pixels of each window, never over the pixels that are absent.

A neighbour list is made once per forward pass and shared by all blocks and both passes. `cpu` and `triton_conv` compute
with it; `pairs` does in plain PyTorch where neither can. Dense arithmetic takes over where points are so dense that
gathering costs more than it saves, and kernels that are not depthwise, which are matrix products, are always dense.
Kernels that a full lattice enlarges are applied as products of low rank (`enlarged`) where no gradient is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from types import ModuleType
from typing import Any

import torch

from diffusion.coordinates import Points, Size, gather_points, scatter_points
from models.operators import dispatch
from models.operators.sparse_conv import enlarged, pairs
from models.operators.sparse_conv.backend import (
    Span,
    check_features,
    check_points,
    inverse_density,
    normalised,
    resample_kernel,
)
from models.operators.sparse_conv.torch_dense import DensePlan, TorchDenseBackend

# Up to these fractions of a lattice, gathering is faster than dense arithmetic. In C it always is. That of Triton
# follows from counted instructions (a list costs as much as a lattice at about half) and awaits its measurement.
# benchmarks/operators.py --ops=engines times every engine.
_UP_TO = {"cpu": 1, "cuda": 1 / 2}
_PAIRS_UP_TO = 1 / 5
# Most bytes of a list. What would need more, as an enlarged kernel on many points, is computed on the whole lattice.
_LIST_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class NativePlan(DensePlan):
    """`DensePlan` with the neighbour lists of the engines that computed with it.

    kernel_size: at the training resolution.
    """

    kernel_size: int = field(kw_only=True)
    lists: dict[ModuleType, Any] = field(default_factory=dict)

    @cached_property
    def inverse_density(self) -> torch.Tensor:
        """As for every plan; without a span, taps count in full, and a list of the windows has counted them already."""
        counted = [made.counts for made in self.lists.values() if made.counts is not None]
        if counted and self.span is None and callable(self.density):
            return self.kernel_size**2 / counted[0].view(-1, self.points.count, 1).float()
        return super().inverse_density

    def neighbours(self, engine: ModuleType) -> Any:
        """The list of an engine, made when first asked for."""
        if engine not in self.lists:
            self.lists[engine] = engine.neighbours(self.points, self.batch, self.kernel_shape, self.device)
        return self.lists[engine]


class NativeBackend:
    """See the module; implements `models.operators.sparse_conv.backend.Backend`."""

    name, depthwise, plain = "native", True, False

    def __init__(self) -> None:
        self._dense = TorchDenseBackend()

    def plan(
        self,
        points: Points,
        batch: int,
        kernel_shape: Size,
        kernel_size: int,
        device: torch.device,
        span: Span | None = None,
    ) -> NativePlan:
        check_points(points, batch, device)
        compute = partial(inverse_density, points, kernel_shape, kernel_size, device, span)
        # Of a full lattice it is arithmetic, and says where the plan is.
        density = compute() if points.is_full else compute
        return NativePlan(points, batch, kernel_shape, density, span=span, kernel_size=kernel_size)

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: NativePlan,
        groups: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_features(x, weight, plan, groups, residual)
        return self.conv_by(_engine(x, weight, plan, groups), x, weight, plan, groups, residual)

    def conv_by(
        self,
        engine: ModuleType | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: NativePlan,
        groups: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`conv` by an engine of the caller's choice, one of `engines`."""
        if engine is enlarged:
            return _enlarged(x, weight, plan, residual)
        if engine is None:
            return self._dense.conv(x, weight, plan, groups, residual)
        taps = resample_kernel(weight, plan.kernel_shape, plan.span).flatten(1).t()  # (C, 1, k', k') -> (K, C)
        taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
        neighbours = plan.neighbours(engine)  # first, as it counts
        return engine.depthwise(x, taps, plan.inverse_density, neighbours, residual)


def _enlarged(x: torch.Tensor, weight: torch.Tensor, plan: NativePlan, residual: torch.Tensor | None) -> torch.Tensor:
    image, kernel = scatter_points(x, plan.points).permute(0, 2, 3, 1), weight.squeeze(1)  # (B, H, W, C), (C, k, k)
    if plan.points.is_full:
        image_residual = None if residual is None else residual.to(x.dtype).view(image.shape)
        scale = plan.inverse_density.view(plan.points.size)
        return enlarged.enlarged(image, kernel, plan.kernel_shape, scale, image_residual, span=plan.span).flatten(1, 2)
    out = gather_points(
        enlarged.enlarged(image, kernel, plan.kernel_shape, span=plan.span).permute(0, 3, 1, 2), plan.points
    )
    return normalised(out, plan, residual)


def engines(x: torch.Tensor, weight: torch.Tensor, plan: NativePlan, groups: int) -> dict[str, ModuleType | None]:
    """What can compute this convolution, by name; the engine of dense arithmetic is None."""
    if not groups == x.shape[2] == weight.shape[0]:
        return {"dense": None}
    found: dict[str, ModuleType | None] = {"dense": None, "pairs": pairs}
    kernel_gradient = torch.is_grad_enabled() and weight.requires_grad
    if not kernel_gradient and enlarged.pays(weight.shape[-1], plan.kernel_shape, plan.span):
        found["enlarged"] = enlarged
    if x.dtype != torch.float64:
        engine = dispatch.kernels("convolution", x.device.type)
        if engine is not None:
            found["kernels"] = engine
    return found


def _engine(x: torch.Tensor, weight: torch.Tensor, plan: NativePlan, groups: int) -> ModuleType | None:
    """The one place that chooses what computes a convolution; None for dense arithmetic."""
    possible, points, device = engines(x, weight, plan, groups), plan.points, x.device.type
    kernel_gradient = torch.is_grad_enabled() and weight.requires_grad
    resampled = plan.span is not None or tuple(weight.shape[-2:]) != tuple(plan.kernel_shape)
    on_lattice = possible.get("enlarged") if resampled else None
    if points.is_full and not kernel_gradient:
        # Only the gradient of the kernel is slow in dense arithmetic, and what grows with the resolution.
        return on_lattice
    density = points.count / (points.size[0] * points.size[1])
    name, most = ("kernels", _UP_TO[device]) if "kernels" in possible else ("pairs", _PAIRS_UP_TO)
    # On a full lattice Triton's kernels need no list, and cuDNN's gradient of a depthwise kernel is the slow part.
    without_list = points.is_full and device == "cuda" and name == "kernels"
    engine = possible.get(name) if density <= most or without_list else None
    if engine is None or engine.list_bytes(points, plan.batch, plan.kernel_shape) > _LIST_BYTES:
        return on_lattice
    return engine
