"""The denoiser: sparse blocks on the points around a U-Net on a coarse grid (paper, section 4.1 and figure 3).

Letters: B batch, C channels, M points, F channels of the sparse level, U side of the grid, G channels of the grid, D
latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from diffusion.coordinates import CONVENTIONS, CoordinateConvention, Points, Size
from models import tiled
from models.coarse_nodes import GridNodes, PointNodes
from models.grid_unet import GridSpec, GridUNet
from models.layers import sinusoidal_features
from models.modulation import Conditioning
from models.operators.dispatch import BackendModule
from models.operators.pointwise.norm_mlp import Affine
from models.operators.sparse_conv.backend import Plan, kernel_window
from models.sparse_block import SparseBlock, check_kernel

OfBlock = tuple[Affine, Affine]  # of the two norms of a sparse block


@dataclass(frozen=True)
class SparseSpec:
    """Architecture on the points.

    channels: F. num_blocks: sparse blocks on the way in, and on the way out. kernel_size: side at the training
    lattice, odd.
    depthwise: one kernel per channel, else full. nearest: points averaged into a grid node. kernel: what the
    kernel is, in `models.sparse_block.KERNELS`.
    convention: name in `diffusion.coordinates.CONVENTIONS`.
    tile_points: most points of a full lattice whose features are held at once where no gradient is wanted and the nodes
    are a grid, 0 for all.
    """

    channels: int
    num_blocks: int
    kernel_size: int
    depthwise: bool = True
    nearest: int = 3
    convention: str = "cell_centred"
    kernel: str = "linear"
    tile_points: int = 0

    def __post_init__(self):
        check_kernel(self.kernel_size, self.kernel)
        if self.convention not in CONVENTIONS:
            raise ValueError(f"model.coordinate_convention is {self.convention!r}; accepted: {', '.join(CONVENTIONS)}")


def check_time_dim(time_dim: int) -> None:
    """Raise ValueError for a width that features of time cannot have: half are sines, half cosines."""
    if time_dim < 4 or time_dim % 2:
        raise ValueError(f"model.time_emb_dim is {time_dim}; accepted: even numbers from 4 on")


class SparseDescent(BackendModule):
    """What denoiser and encoder share: points in, sparse blocks, and the way to the grid."""

    def __init__(
        self,
        in_channels: int,
        train_size: Size,
        sparse: SparseSpec,
        grid: GridSpec,
        *,
        time_dim: int | None = None,
        z_dim: int | None = None,
        block_norm: bool = True,
    ):
        super().__init__()
        self.in_channels, self.train_size = in_channels, tuple(train_size)
        self.sparse_spec, self.grid_spec = sparse, grid
        self.linear_in = nn.Linear(in_channels, sparse.channels)
        self.down_blocks = nn.ModuleList(
            self._block(time_dim=time_dim, z_dim=z_dim, norm=block_norm) for _ in range(sparse.num_blocks)
        )
        self.to_grid = nn.Linear(sparse.channels, grid.input_channels)

    def _block(self, **options: Any) -> SparseBlock:
        spec = self.sparse_spec
        return SparseBlock(
            spec.channels,
            spec.kernel_size,
            depthwise=spec.depthwise,
            kernel=spec.kernel,
            train_size=self.train_size,
            **options,
        )

    @property
    def convention(self) -> CoordinateConvention:
        """What the coordinate of a pixel is, for this network."""
        return CONVENTIONS[self.sparse_spec.convention]

    def check(self, x: torch.Tensor, points: Points) -> None:
        """Raise ValueError when x and points do not fit."""
        expected = (x.shape[0] if points.index is None else points.index.shape[0], points.count, self.in_channels)
        if tuple(x.shape) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; accepted: {expected}, for these points and this network")

    def plan(self, x: torch.Tensor, points: Points) -> Plan:
        """What all sparse blocks share in a forward pass."""
        kernel_size = self.sparse_spec.kernel_size
        kernel_shape, span = kernel_window(kernel_size, points.size, self.train_size, self.convention)
        return self.backend.plan(points, x.shape[0], kernel_shape, kernel_size, x.device, span)

    def needs_tiles(self, points: Points) -> bool:
        """Whether functions known at these points are too large to be held at once without gradients."""
        limit = self.sparse_spec.tile_points
        return points.index is None and 0 < limit < points.count and self.grid_spec.nodes == "grid"

    def nodes(self, x: torch.Tensor, points: Points) -> GridNodes | PointNodes:
        """The nodes of the inner network for points with features x (B, M, C)."""
        grid, batch = self.grid_spec, x.shape[0]
        geometry = (self.sparse_spec.nearest, self.convention, x.device, self.backend.plain)
        if grid.nodes == "grid":
            return GridNodes(points, batch, grid.resolution, *geometry)
        return PointNodes(points, batch, grid.nodes, grid.sides, *geometry)

    def descend(
        self,
        x: torch.Tensor,
        plan: Plan,
        nodes: GridNodes | PointNodes,
        affines: Sequence[OfBlock] | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x: (B, M, C). affines: of the blocks. Returns the output (B, M, F) of every one, and node features
        (B, U, U, G)."""
        h, skips = self.linear_in(x), []  # (B, M, F)
        for block, of_block in zip(self.down_blocks, affines or [(None, None)] * len(self.down_blocks)):
            h = block(h, plan, affines=of_block)
            skips.append(h)
        # Weights sum to one, so the projection may follow the average: it then runs on U² nodes instead of M points.
        return skips, self.to_grid(nodes.enter(h))  # (B, U, U, F) -> (B, U, U, G)


class SparseUNet(SparseDescent):
    """Denoiser of functions known at any points of any lattice, conditioned on time and, given z_dim, on a latent.

    in_channels, out_channels: of the function and of the prediction. train_size: (H, W) of the training resolution, to
    which kernel sizes refer. time_dim: width of the time embedding, even. z_dim: D, or None (or 0) for an
    unconditional denoiser.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        train_size: Size,
        sparse: SparseSpec,
        grid: GridSpec,
        *,
        time_dim: int,
        z_dim: int | None = None,
    ):
        check_time_dim(time_dim)
        super().__init__(in_channels, train_size, sparse, grid, time_dim=time_dim, z_dim=z_dim)
        self.time_dim, self.z_dim = time_dim, z_dim or None
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))
        self.grid = GridUNet(self.grid_spec, time_dim, z_dim)
        self.from_grid = nn.Linear(grid.input_channels, sparse.channels)
        self.up_blocks = nn.ModuleList(
            self._block(time_dim=time_dim, z_dim=z_dim, takes_skip=True) for _ in range(sparse.num_blocks)
        )
        self.linear_out = nn.Linear(sparse.channels, out_channels)

    def conditioning(self, z: torch.Tensor | None) -> Conditioning:
        """What `forward` takes in place of z (B, D), for many evaluations with the same latents."""
        blocks = (*self.down_blocks, *self.grid.blocks(), *self.up_blocks)
        return Conditioning([pair for block in blocks for pair in block.modulated], z)

    def forward(
        self, x: torch.Tensor, points: Points, t: torch.Tensor, z: torch.Tensor | Conditioning | None = None
    ) -> torch.Tensor:
        """Prediction (B, M, C_out) at the points.

        x: (B, M, C), the noisy function at the points. t: (B,), in thousandths of the process, float. z: (B, D), or
        the `conditioning` it gives.
        Raises ValueError when shapes do not fit, z is missing or not wanted, or there are fewer points than K.
        """
        given = None if z is None or z.shape is None else tuple(z.shape)
        wanted = None if self.z_dim is None else (x.shape[0], self.z_dim)
        if given != wanted:
            raise ValueError(f"z is {given}; accepted: {wanted}")
        self.check(x, points)
        nodes = self.nodes(x, points)
        e = self.time_mlp(sinusoidal_features(t, self.time_dim).to(self.linear_in.weight.dtype))  # (B, time_dim)
        affines = (z if isinstance(z, Conditioning) else self.conditioning(z))(e)
        begin, end = 2 * len(self.down_blocks), len(affines) - 2 * len(self.up_blocks)
        down, of_grid, up = _pairs(affines[:begin]), affines[begin:end], _pairs(affines[end:])
        if self.needs_tiles(points) and not torch.is_grad_enabled():
            return tiled.evaluate(self, x, points.size, nodes, down, of_grid, up)
        plan = self.plan(x, points)
        skips, grid = self.descend(x, plan, nodes, down)
        h = F.linear(self.grid(grid, of_grid, nodes.pyramid), self.from_grid.weight)  # (B, U, U, G) -> (B, U, U, F)
        # The bias comes after reading: weights at a border may sum to less than one.
        h, bias = nodes.leave(h), self.from_grid.bias.to(h.dtype)  # (B, M, F)
        h = h + bias if torch.is_grad_enabled() else h.add_(bias)
        for block, of_block in zip(self.up_blocks, up):
            h = block(h, plan, skip=skips.pop(), affines=of_block)  # (B, M, F)
        return self.linear_out(h)


def _pairs(affines: list[Affine]) -> list[OfBlock]:
    return list(zip(affines[::2], affines[1::2]))
