"""The residual block on points, one for every back end and for full lattices alike.

Letters: B batch, C channels, M points, k kernel side.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from diffusion.coordinates import Size
from models.continuous_kernel import ContinuousKernel
from models.modulation import Modulation
from models.operators.dispatch import BackendModule
from models.operators.pointwise.norm_mlp import Affine, join, norm_modulate, norm_modulate_mlp
from models.operators.sparse_conv.backend import Plan

KERNELS = ("linear", "nonlinear", "continuous")


def check_kernel(kernel_size: int, kernel: str) -> None:
    """Raise ValueError for a kernel that no sparse block has."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"model.kernel_size is {kernel_size}; accepted: odd numbers from 1 on")
    if kernel not in KERNELS:
        raise ValueError(f"model.kernel is {kernel!r}; accepted: {', '.join(KERNELS)}")


class SparseBlock(BackendModule):
    """Density-normalised convolution over the present points, then a pointwise MLP, both residual (paper, section 4.1).

        x ← Linear([x, skip])                     if the block takes a skip
        x ← x + conv(mod₁(norm₁(x))) / density
        x ← x + MLP(mod₂(norm₂(x)))

    With norm=False (the published encoder) the block is x ← x + c + MLP(c), c = conv(x)/density, without norms or
    modulation.

    channels: C. kernel_size: k, odd. depthwise: one kernel per channel, else full. takes_skip: whether `forward` gets
    a skip. kernel: "linear", k × k weights; "nonlinear", conv, GELU, conv in place of conv (Table 2); "continuous", a
    network of the offset in place of weights, which needs train_size, the lattice that k refers to.
    time_dim, z_dim: widths of the conditioning, None for none.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        depthwise: bool = True,
        takes_skip: bool = False,
        time_dim: int | None = None,
        z_dim: int | None = None,
        norm: bool = True,
        kernel: str = "linear",
        train_size: Size | None = None,
    ):
        super().__init__()
        check_kernel(kernel_size, kernel)
        if kernel == "continuous" and train_size is None:
            raise ValueError("train_size is None; accepted: (H, W), with model.kernel='continuous'")
        if not norm and (time_dim or z_dim):
            raise ValueError("norm is False; accepted: True, for a block conditioned on time or latent")
        self.depthwise, self.groups = depthwise, channels if depthwise else 1
        self.skip = nn.Linear(2 * channels, channels) if takes_skip else None
        self.norm1 = nn.LayerNorm(channels) if norm else None
        self.norm2 = nn.LayerNorm(channels) if norm else None
        self.modulation1 = Modulation(channels, time_dim, z_dim)
        self.modulation2 = Modulation(channels, time_dim, z_dim)
        # The published models count all channels in the fan of depthwise kernels too: √C smaller than Conv2d's default.
        bound = 1 / math.sqrt(channels * kernel_size**2)
        shape = (channels, channels // self.groups)
        if kernel == "continuous":
            self.kernel = ContinuousKernel(shape, kernel_size, train_size, bound)
        else:
            self.kernel = nn.Parameter(torch.empty(*shape, kernel_size, kernel_size))
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.second_kernel = nn.Parameter(torch.empty_like(self.kernel)) if kernel == "nonlinear" else None
        for table in (self.kernel, self.second_kernel):
            if isinstance(table, nn.Parameter):
                nn.init.uniform_(table, -bound, bound)

    @property
    def modulated(self) -> list[tuple[nn.LayerNorm, Modulation]]:
        """The norms, and what modulates their results."""
        return [(self.norm1, self.modulation1), (self.norm2, self.modulation2)]

    @property
    def convolutions(self) -> int:
        """How many of them follow one another."""
        return 1 if self.second_kernel is None else 2

    def forward(
        self,
        x: torch.Tensor,
        plan: Plan,
        *,
        skip: torch.Tensor | None = None,
        affines: tuple[Affine | None, Affine | None] = (None, None),
    ) -> torch.Tensor:
        """x, skip: (B, M, C); affines: of norm1 and norm2, as modulated; None without modulation. Returns (B, M, C).

        Where no gradient is wanted, a block that takes a skip may write over x.
        """
        if self.skip is not None:
            x = join(x, skip, self.skip)
        if self.norm1 is None:
            c = self._integral(x, plan)
            return x + c + self.mlp(c)
        plain = self.backend.plain
        h = norm_modulate(x, self.norm1, affines[0], plain)
        x = self._integral(h, plan, residual=x)
        return norm_modulate_mlp(x, self.norm2, affines[1], self.mlp, plain)

    def _integral(self, h: torch.Tensor, plan: Plan, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Eq. (20), or with a nonlinear kernel a case of eq. (18), at the points."""
        kernel = self.kernel
        if isinstance(kernel, ContinuousKernel):
            kernel = kernel(plan.lattice or plan.points.size, plan.kernel_shape, plan.span)
            if plan.span is not None:  # it is made for this lattice, not resampled; the density stays
                plan = replace(plan, span=None, density=plan.inverse_density)
        elif self.second_kernel is not None:
            h, kernel = F.gelu(self.backend.conv(h, kernel, plan, self.groups)), self.second_kernel
        return self.backend.conv(h, kernel, plan, self.groups, residual)
