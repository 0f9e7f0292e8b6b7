"""The encoder of the diffusion autoencoder: points to a latent vector (paper, section 4.2).

Letters: B batch, C channels, M points, U side of the grid, D latent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from diffusion.coordinates import Points, Size
from models import tiled
from models.grid_unet import GridEncoder, GridSpec
from models.sparse_unet import SparseDescent, SparseSpec
from models.texture import TextureCode


class Encoding(NamedTuple):
    """A Gaussian over latents, and a draw from it: all (B, D)."""

    z: torch.Tensor
    mu: torch.Tensor
    logvar: torch.Tensor


class SparseEncoder(SparseDescent):
    """The first half of the denoiser's architecture, without conditioning, averaged over the coarsest grid.

    in_channels, train_size, sparse, grid: as for `SparseUNet`. z_dim: D. stochastic: return an `Encoding`.
    block_norm: norms in the sparse blocks; False is the published encoder. texture: windows of a `TextureCode` of the
    function on the grid, () for none.
    """

    def __init__(
        self,
        in_channels: int,
        z_dim: int,
        train_size: Size,
        sparse: SparseSpec,
        grid: GridSpec,
        *,
        stochastic: bool = False,
        block_norm: bool = True,
        texture: tuple[int, ...] = (),
    ):
        if texture and grid.nodes != "grid":
            raise ValueError(f"model.downsampling is {grid.nodes!r}; accepted: 'grid', with model.encoder_texture")
        if max(texture, default=0) > grid.resolution:
            raise ValueError(f"model.encoder_texture is {texture}; accepted: at most model.uno_res, {grid.resolution}")
        super().__init__(in_channels, train_size, sparse, grid, block_norm=block_norm)
        self.z_dim = z_dim
        self.grid = GridEncoder(self.grid_spec, z_dim)
        self.linear_out = nn.Linear(z_dim, z_dim)
        self.texture = TextureCode(texture, z_dim) if texture else None
        self.mu = nn.Linear(z_dim, z_dim) if stochastic else None
        self.logvar = nn.Linear(z_dim, z_dim) if stochastic else None

    def forward(self, x: torch.Tensor, points: Points, noise: torch.Tensor | None = None) -> torch.Tensor | Encoding:
        """The latent (B, D) of functions x (B, M, C) known at the points; any lattice, any number of points from K up.

        A stochastic encoder returns an `Encoding` with z = mu + exp(logvar/2)·noise, noise (B, D) standard normal;
        without noise z is mu. Raises ValueError when shapes do not fit or there are fewer points than a node averages.
        """
        self.check(x, points)
        nodes = self.nodes(x, points)
        if self.needs_tiles(points) and not torch.is_grad_enabled():
            grid = tiled.descend(self, x, points.size, nodes)
        else:
            _, grid = self.descend(x, self.plan(x, points), nodes)
        h = self.grid(grid, nodes.pyramid).mean(dim=(1, 2))  # (B, U', U', D) -> (B, D)
        z = self.linear_out(h)
        if self.texture is not None:
            z = z + self.texture(nodes.enter(x))
        if self.mu is None:
            return z
        mu, logvar = self.mu(z), self.logvar(z)
        return Encoding(mu if noise is None else mu + torch.exp(logvar / 2) * noise, mu, logvar)
