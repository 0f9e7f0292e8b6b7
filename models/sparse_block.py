"""The residual block on points, one for every back end and for full lattices alike.

Letters: B batch, C channels, M points, k kernel side.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from models.layers import Modulation
from models.operators.base import Backend, Plan


class SparseBlock(nn.Module):
    """Density-normalised convolution over the present points, then a pointwise MLP, both residual (paper, section 4.1).

        x ← Linear([x, skip])                     if the block takes a skip
        x ← x + conv(mod₁(norm₁(x))) / density
        x ← x + MLP(mod₂(norm₂(x)))

    With norm=False (the published encoder) the block is x ← x + c + MLP(c), c = conv(x)/density, without norms or
    modulation.

    channels: C. kernel_size: k, odd. depthwise: one kernel per channel, else full. takes_skip: whether `forward` gets
    a skip.
    time_dim, z_dim: widths of the conditioning, None for none. backend: what computes the convolution.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        backend: Backend,
        *,
        depthwise: bool = True,
        takes_skip: bool = False,
        time_dim: int | None = None,
        z_dim: int | None = None,
        norm: bool = True,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"model.kernel_size is {kernel_size}; it must be odd and positive")
        if not norm and (time_dim or z_dim):
            raise ValueError("a sparse block without norms cannot be conditioned on time or latent")
        self.backend = backend
        self.groups = channels if depthwise else 1
        self.skip = nn.Linear(2 * channels, channels) if takes_skip else None
        self.norm1 = nn.LayerNorm(channels) if norm else None
        self.norm2 = nn.LayerNorm(channels) if norm else None
        self.modulation1 = Modulation(channels, time_dim, z_dim)
        self.modulation2 = Modulation(channels, time_dim, z_dim)
        self.kernel = nn.Parameter(torch.empty(channels, channels // self.groups, kernel_size, kernel_size))
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        # The published models count all channels in the fan of depthwise kernels too: √C smaller than Conv2d's default.
        bound = 1 / math.sqrt(channels * kernel_size**2)
        nn.init.uniform_(self.kernel, -bound, bound)

    def forward(
        self,
        x: torch.Tensor,
        plan: Plan,
        *,
        skip: torch.Tensor | None = None,
        e: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x, skip: (B, M, C); e: (B, time_dim); z: (B, z_dim). Returns (B, M, C)."""
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=2))  # (B, M, 2C) -> (B, M, C)
        if self.norm1 is None:
            c = self.backend.conv(x, self.kernel, plan, self.groups)
            return x + c + self.mlp(c)
        h = self.modulation1(self.norm1(x), e, z)
        x = self.backend.conv(h, self.kernel, plan, self.groups, residual=x)
        return x + self.mlp(self.modulation2(self.norm2(x), e, z))
