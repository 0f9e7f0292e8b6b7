"""Plain PyTorch: scatter the points to a lattice of zeros, `conv2d`, gather. Works everywhere; the baseline.

Letters: B batch, C channels, M points, H × W lattice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from diffusion.coordinates import Points, Size
from models.operators.sparse_conv.backend import (
    Plan,
    Span,
    check_features,
    check_points,
    inverse_density,
    normalised,
    resample_kernel,
)


@dataclass(frozen=True, eq=False)
class DensePlan(Plan):
    """`Plan` that knows where the points are in the lattices of the batch laid end to end."""

    @cached_property
    def lattice_rows(self) -> torch.Tensor | None:
        """Rows (B·M,) of the points; None if they are all of them."""
        if self.points.index is None:
            return None
        first = torch.arange(self.batch, device=self.points.index.device) * (self.points.size[0] * self.points.size[1])
        return (self.points.index + first[:, None]).flatten()


class TorchDenseBackend:
    """See the module; implements `models.operators.sparse_conv.backend.Backend`."""

    name, depthwise, plain = "torch_dense", True, True

    def plan(
        self,
        points: Points,
        batch: int,
        kernel_shape: Size,
        kernel_size: int,
        device: torch.device,
        span: Span | None = None,
    ) -> DensePlan:
        check_points(points, batch, device)
        return DensePlan(
            points, batch, kernel_shape, inverse_density(points, kernel_shape, kernel_size, device, span), span=span
        )

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: DensePlan,
        groups: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_features(x, weight, plan, groups, residual)
        (height, width), channels, rows = plan.points.size, x.shape[2], plan.lattice_rows
        if rows is not None:
            lattice = x.new_zeros(plan.batch * height * width, channels)
            x = lattice.index_copy(0, rows, x.reshape(-1, channels))  # (BHW, C)
        image = x.reshape(plan.batch, height, width, channels).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
        padding = (plan.kernel_shape[0] // 2, plan.kernel_shape[1] // 2)
        taps = resample_kernel(weight, plan.kernel_shape, plan.span).to(image.dtype)
        out = F.conv2d(image, taps, padding=padding, groups=groups)
        out = out.permute(0, 2, 3, 1).reshape(plan.batch, height * width, -1)  # (B, HW, C_out)
        if rows is not None:
            out = out.flatten(0, 1).index_select(0, rows).unflatten(0, (plan.batch, -1))  # (B, M, C_out)
        return normalised(out, plan, residual)
