"""The operator on the coarse grid: a U-Net, and its encoder half.

Features are channels-last (B, H, W, C); convolutions see them as (B, C, H, W) views in channels-last memory, without
copies. Letters: B batch, C channels, H × W grid of the level at hand, D output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.coarse_nodes import NODES, Pyramid
from models.layers import Attention, Dropout
from models.modulation import Modulation
from models.operators.dispatch import BackendModule
from models.operators.pointwise.norm_mlp import Affine, norm_modulate
from models.point_conv import PointConv, Stencil
from models.spectral import SpectralConv

CONV_TYPES = ("conv", "spectral")
_HEAD_WIDTH = 128  # hidden channels of the U-Net's output layers


@dataclass(frozen=True)
class GridSpec:
    """Architecture on the coarse grid.

    resolution: side of the grid. base_channels: channels of the finest level, `mults` times it after each level.
    blocks_per_level: residual blocks of each level. attention_resolutions: sides at which a level attends.
    dropout: rate, active where the side is at most `dropout_resolution`. conv_type: "conv" or "spectral".
    attention: "sdpa" or "flash_attn". nodes: "grid", or how subsets of the points are drawn in its place, level by
    level; features are then (B, N, 1, C), and the networks take the `Pyramid` of the subsets.
    """

    resolution: int
    base_channels: int
    mults: tuple[int, ...]
    blocks_per_level: tuple[int, ...]
    attention_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    dropout_resolution: int = 0
    conv_type: str = "conv"
    attention: str = "sdpa"
    nodes: str = "grid"

    def __post_init__(self):
        levels = len(self.mults)
        if levels == 0:
            raise ValueError("model.uno_mults is empty; accepted: one multiplier per level")
        if len(self.blocks_per_level) != levels:
            raise ValueError(
                f"model.uno_blocks_per_level is {self.blocks_per_level}; accepted: {levels} entries, one per level"
            )
        if self.resolution < 1 or self.resolution % 2 ** (levels - 1):
            raise ValueError(
                f"model.uno_res is {self.resolution}; accepted: a multiple of {2 ** (levels - 1)}, for {levels} levels"
            )
        if self.conv_type not in CONV_TYPES:
            raise ValueError(f"model.uno_conv_type is {self.conv_type!r}; accepted: {', '.join(CONV_TYPES)}")
        if self.nodes not in NODES:
            raise ValueError(f"model.downsampling is {self.nodes!r}; accepted: {', '.join(NODES)}")
        if self.nodes != "grid" and self.conv_type != "conv":
            raise ValueError(
                f"model.uno_conv_type is {self.conv_type!r}; accepted: 'conv', with model.downsampling={self.nodes!r}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the finest level."""
        return self.resolution, self.resolution

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of level 0, 1, …, and of the middle."""
        return (self.base_channels, *(self.base_channels * mult for mult in self.mults))

    @property
    def input_channels(self) -> int:
        """Channels a grid network takes: those of the finest level."""
        return self.base_channels

    @property
    def layer(self) -> str:
        """What stands for a convolution: "conv", "spectral" or, between points, "points"."""
        return self.conv_type if self.nodes == "grid" else "points"

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of every level's grid."""
        return tuple(self.side(level) for level in range(len(self.mults)))

    def side(self, level: int) -> int:
        """Side of a level's grid."""
        return self.resolution // 2**level


class _Conv2d(nn.Conv2d):
    """`Conv2d` on (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _ConvTranspose2d(nn.ConvTranspose2d):
    """`ConvTranspose2d` on (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _conv(conv_type: str, c_in: int, c_out: int, resize: str = "same") -> nn.Module:
    """A 3×3 convolution, or the layer that stands for it, which keeps, halves or doubles the side."""
    if conv_type == "spectral":
        return SpectralConv(c_in, c_out, resize)
    if conv_type == "points":
        return PointConv(c_in, c_out)  # the stencil says where from and where to
    if resize == "double":
        layer = _ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
    else:
        layer = _Conv2d(c_in, c_out, 3, stride=2 if resize == "half" else 1, padding=1)
    return layer.to(memory_format=torch.channels_last)  # the layout of the features: else every call converts it


class GridBlock(BackendModule):
    """shortcut(x) + conv(Dropout(GELU(mod(norm(conv(GELU(norm(x)))))))), conditioned on time and latent."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        time_dim: int | None,
        z_dim: int | None,
        dropout: float,
        conv_type: str = "conv",
    ):
        super().__init__()
        self.norm_in = nn.LayerNorm(c_in)
        self.conv_in = _conv(conv_type, c_in, c_out)
        self.norm_out = nn.LayerNorm(c_out)
        self.modulation = Modulation(c_out, time_dim, z_dim)
        self.dropout = Dropout(dropout)
        self.conv_out = _conv(conv_type, c_out, c_out)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Linear(c_in, c_out)

    @property
    def modulated(self) -> list[tuple[nn.LayerNorm, Modulation]]:
        """The norm that is modulated, and what does it."""
        return [(self.norm_out, self.modulation)]

    def forward(self, x: torch.Tensor, affine: Affine | None = None, *stencil: Stencil) -> torch.Tensor:
        """x: (B, H, W, c_in). affine: of norm_out, as modulated; None without modulation. Returns (B, H, W, c_out)."""
        plain = self.backend.plain
        h = self.conv_in(F.gelu(norm_modulate(x, self.norm_in, plain=plain)), *stencil)
        h = norm_modulate(h, self.norm_out, affine, plain)
        return self.shortcut(x) + self.conv_out(self.dropout(F.gelu(h)), *stencil)


def _stencil(of_levels: Sequence[Stencil] | None, level: int) -> tuple[Stencil, ...]:
    """What a level's convolutions take beside features: nothing on a grid, the level's stencil between points."""
    return () if of_levels is None else (of_levels[level],)


class GridLevel(nn.Module):
    """Blocks of one resolution, each followed by attention where the spec asks for it, then the way onwards."""

    def __init__(
        self,
        spec: GridSpec,
        level: int,
        channels: tuple[int, int],
        next_channels: int,
        resize: str,
        time_dim: int | None,
        z_dim: int | None,
    ):
        super().__init__()
        side, count = spec.side(level), spec.blocks_per_level[level]
        self.blocks = nn.ModuleList(
            GridBlock(*channels, time_dim, z_dim, _dropout(spec, level), spec.layer) for _ in range(count)
        )
        attends = side in spec.attention_resolutions
        self.attentions = nn.ModuleList(
            Attention(channels[1], spec.attention) if attends else nn.Identity() for _ in range(count)
        )
        self.resample = _conv(spec.layer, channels[1], next_channels, resize)


def _dropout(spec: GridSpec, level: int) -> float:
    return spec.dropout if spec.side(level) <= spec.dropout_resolution else 0.0


class GridTrunk(nn.Module):
    """Input projection, all levels downwards, and the middle. The last level keeps its side."""

    def __init__(self, spec: GridSpec, time_dim: int | None, z_dim: int | None):
        super().__init__()
        widths, last = spec.widths, len(spec.mults) - 1
        self.appends_coordinates = spec.conv_type == "spectral"  # which has no other way to know where it is
        self.fc0 = nn.Linear(spec.input_channels + 2 * self.appends_coordinates, widths[0])
        self.downs = nn.ModuleList(
            GridLevel(
                spec, level, (width, width), widths[level + 1], "same" if level == last else "half", time_dim, z_dim
            )
            for level, width in enumerate(widths[:-1])
        )
        middle = (widths[-1], widths[-1], time_dim, z_dim, _dropout(spec, last), spec.layer)
        self.mid_block1 = GridBlock(*middle)
        self.mid_attention = Attention(widths[-1], spec.attention)
        self.mid_block2 = GridBlock(*middle)

    def blocks(self) -> list[GridBlock]:
        """All blocks, in the order in which they are computed."""
        return [*(block for level in self.downs for block in level.blocks), self.mid_block1, self.mid_block2]

    def descend(
        self, x: torch.Tensor, affines: Iterator[Affine | None], pyramid: Pyramid | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x: (B, H, W, C). affines: of the blocks, one by one. Returns the coarsest features and, finest first, the
        output of every block."""
        same, down = (None, None) if pyramid is None else (pyramid.same, pyramid.down)
        if self.appends_coordinates:
            x = torch.cat([x, _coordinate_channels(x)], dim=3)  # (B, H, W, C + 2)
        h, skips = self.fc0(x), []
        for depth, level in enumerate(self.downs):
            for block, attention in zip(level.blocks, level.attentions):
                h = attention(block(h, next(affines), *_stencil(same, depth)))
                skips.append(h)
            h = level.resample(h, *_stencil(down, depth))  # (B, H/2, W/2, C'), or (B, H, W, C') after the last
        h = self.mid_block1(h, next(affines), *_stencil(same, -1))
        return self.mid_block2(self.mid_attention(h), next(affines), *_stencil(same, -1)), skips


def _coordinate_channels(x: torch.Tensor) -> torch.Tensor:
    """Row and column coordinates in [0, 1] of the cell centres: (B, H, W, 2)."""
    axes = [(torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n for n in x.shape[1:3]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=2).expand(x.shape[0], -1, -1, -1)


class GridUNet(GridTrunk):
    """(B, H, W, C) to (B, H, W, C), C = base_channels, conditioned on time and latent."""

    def __init__(self, spec: GridSpec, time_dim: int | None, z_dim: int | None):
        super().__init__(spec, time_dim, z_dim)
        widths = spec.widths
        self.ups = nn.ModuleList(  # deepest level first
            GridLevel(
                spec,
                level,
                (widths[level + 1] + widths[level], widths[level + 1]),
                widths[level],
                "double" if level else "same",
                time_dim,
                z_dim,
            )
            for level in reversed(range(len(spec.mults)))
        )
        self.fc1 = nn.Linear(widths[0], _HEAD_WIDTH)
        self.fc2 = nn.Linear(_HEAD_WIDTH, spec.input_channels)

    def blocks(self) -> list[GridBlock]:
        return [*super().blocks(), *(block for level in self.ups for block in level.blocks)]

    def forward(
        self, x: torch.Tensor, affines: Sequence[Affine] | None = None, pyramid: Pyramid | None = None
    ) -> torch.Tensor:
        """x: (B, H, W, C); affines: of `blocks`; pyramid: of the nodes where they are points."""
        same, up = (None, None) if pyramid is None else (pyramid.same, pyramid.up)
        of_blocks = iter(affines or [None] * len(self.blocks()))
        h, skips = self.descend(x, of_blocks, pyramid)
        for depth, level in zip(reversed(range(len(self.ups))), self.ups):
            for block, attention in zip(level.blocks, level.attentions):
                h = attention(block(torch.cat([h, skips.pop()], dim=3), next(of_blocks), *_stencil(same, depth)))
            h = level.resample(h, *_stencil(up, depth))  # (B, 2H, 2W, C'), or (B, H, W, C') after the last
        return self.fc2(F.gelu(self.fc1(h)))


class GridEncoder(GridTrunk):
    """The downward half, projected to D channels: (B, H, W, C) to (B, H', W', D). Not conditioned."""

    def __init__(self, spec: GridSpec, out_channels: int):
        super().__init__(spec, None, None)
        self.fc1 = nn.Linear(spec.widths[-1], out_channels)

    def forward(self, x: torch.Tensor, pyramid: Pyramid | None = None) -> torch.Tensor:
        h, _ = self.descend(x, iter([None] * len(self.blocks())), pyramid)
        return self.fc1(h)
