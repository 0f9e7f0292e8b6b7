"""The native back end: sums over the present pixels of each window, never over the pixels that are absent.

A neighbour list is made once per forward pass and shared by all blocks and both passes. `cpu` and `triton_conv` compute
with it; `pairs` does in plain PyTorch where neither can. Dense arithmetic takes over where points are so dense that
gathering costs more than it saves, and kernels that are not depthwise, which are matrix products, are always dense.
Kernels that a full lattice enlarges are applied as products of low rank (`enlarged`) where no gradient is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from diffusion.coordinates import Points, Size
from models.operators.base import Span, check_features, check_points, inverse_density, resample_kernel
from models.operators.dispatch import kernels
from models.operators.native import enlarged, pairs
from models.operators.torch_dense import DensePlan, TorchDenseBackend

# Up to these parts of a lattice gathering is faster than dense arithmetic. Whoever measures anew uses
# benchmarks/operators.py. In C it always is; Triton's part follows from counted instructions (a list costs as much as
# a lattice at about half) and awaits its measurement.
_UP_TO = {"cpu": 1, "cuda": 1 / 2}
_PAIRS_UP_TO = 1 / 5


@dataclass(frozen=True, eq=False)
class NativePlan(DensePlan):
    """`DensePlan` with the neighbour lists of the engines that computed with it."""

    lists: dict[ModuleType, Any] = field(default_factory=dict)

    def neighbours(self, engine: ModuleType) -> Any:
        """The list of an engine, made when first asked for."""
        if engine not in self.lists:
            device = self.inverse_density.device
            self.lists[engine] = engine.neighbours(self.points, self.batch, self.extent, device)
        return self.lists[engine]


class NativeBackend:
    """See the module; implements `models.operators.base.Backend`."""

    name, plain = "native", False

    def __init__(self) -> None:
        self._dense = TorchDenseBackend()

    def plan(
        self,
        points: Points,
        batch: int,
        extent: Size,
        kernel_size: int,
        device: torch.device,
        span: Span | None = None,
    ) -> NativePlan:
        check_points(points, batch, device)
        return NativePlan(points, batch, extent, inverse_density(points, extent, kernel_size, device, span), span=span)

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: NativePlan,
        groups: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_features(x, weight, plan, groups, residual)
        engine = _engine(x, weight, plan, groups)
        if engine is enlarged:
            image = x.unflatten(1, plan.points.size)  # (B, H, W, C)
            image_residual = None if residual is None else residual.to(x.dtype).view(image.shape)
            scale = plan.inverse_density.view(plan.points.size)
            out = enlarged.enlarged(image, weight.squeeze(1), plan.extent, scale, image_residual, span=plan.span)
            return out.flatten(1, 2)
        if engine is None:
            return self._dense.conv(x, weight, plan, groups, residual)
        taps = resample_kernel(weight, plan.extent, plan.span).flatten(1).t()  # (C, 1, k', k') -> (K, C)
        taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
        return engine.depthwise(x, taps, plan.inverse_density, plan.neighbours(engine), residual)


def _engine(x: torch.Tensor, weight: torch.Tensor, plan: NativePlan, groups: int) -> ModuleType | None:
    """What computes this convolution fastest; None for dense arithmetic."""
    if not groups == x.shape[2] == weight.shape[0]:
        return None
    training = torch.is_grad_enabled()
    if plan.points.is_full and not (training and weight.requires_grad):
        # Only the gradient of the kernel is slow in dense arithmetic, and what grows with the resolution.
        resampled = plan.span is not None or tuple(weight.shape[-2:]) != tuple(plan.extent)
        cheaper = resampled and enlarged.pays(weight.shape[-1], plan.extent, plan.span)
        return enlarged if cheaper else None
    density = plan.points.count / (plan.points.size[0] * plan.points.size[1])
    if x.dtype != torch.float64:
        engine = kernels("convolution", x.device.type)
        if engine is not None:
            return engine if density <= _UP_TO[x.device.type] else None
    return pairs if density <= _PAIRS_UP_TO else None
