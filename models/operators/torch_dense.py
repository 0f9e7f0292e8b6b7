"""Plain PyTorch: scatter the points to a lattice of zeros, `conv2d`, gather. Works everywhere; the baseline.

Letters: B batch, C channels, M points, H × W lattice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusion.coordinates import Points, Size
from models.operators.base import Plan, resample_kernel, window_counts


@dataclass(frozen=True, eq=False)
class DensePlan(Plan):
    """`Plan` with the rows (B·M,) of the points in the lattices of the batch laid end to end; None if all of them."""

    rows: torch.Tensor | None


class TorchDenseBackend:
    """See the module; implements `models.operators.base.Backend`."""

    name = "torch_dense"

    def plan(self, points: Points, batch: int, extent: Size, kernel_size: int, device: torch.device) -> DensePlan:
        inverse_density = kernel_size**2 / window_counts(points, extent, device).unsqueeze(2).float()  # (B or 1, M, 1)
        rows = None
        if points.index is not None:
            first = torch.arange(batch, device=device) * (points.size[0] * points.size[1])
            rows = (points.index + first[:, None]).flatten()  # (BM,)
        return DensePlan(points, batch, extent, inverse_density, rows)

    def conv(
        self, x: torch.Tensor, weight: torch.Tensor, plan: DensePlan, groups: int, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        (height, width), channels = plan.points.size, x.shape[2]
        if plan.rows is not None:
            lattice = x.new_zeros(plan.batch * height * width, channels)
            x = lattice.index_copy(0, plan.rows, x.reshape(-1, channels))  # (BHW, C)
        image = x.reshape(plan.batch, height, width, channels).permute(0, 3, 1, 2)  # (B, C, H, W), channels last
        padding = (plan.extent[0] // 2, plan.extent[1] // 2)
        out = F.conv2d(image, resample_kernel(weight, plan.extent), padding=padding, groups=groups)
        out = out.permute(0, 2, 3, 1).reshape(plan.batch, height * width, -1)  # (B, HW, C_out)
        if plan.rows is not None:
            out = out.flatten(0, 1).index_select(0, plan.rows).unflatten(0, (plan.batch, -1))  # (B, M, C_out)
        out = out * plan.inverse_density.to(out.dtype)
        return out if residual is None else residual + out
