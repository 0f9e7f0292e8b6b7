"""Between points and coarse grid: inverse-distance weighting one way, bilinear reading the other (paper, section 4.1).

Both are sparse linear maps with a few entries per output, fixed once the points are known. Positions and weights are
float32 in every precision and carry no gradient. Letters: B batch, C channels, M points, N source rows, Q output
rows, U_h × U_w grid, K entries per output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from diffusion.coordinates import CoordinateConvention, Points, Size
from models.neighbours import nearest_rows

_CLOSEST = 1e-16  # squared distance below which a pixel coincides with a node, and then counts alone


@dataclass(frozen=True, eq=False)
class WeightedGather:
    """out(b, q) = Σ_k weights(b·Q + q, k) · x(rows(b·Q + q, k)), rows counted through the batch laid end to end.

    batch: B. rows: int64 (B·Q, K). weights: float32 (B·Q, K).
    """

    batch: int
    rows: torch.Tensor
    weights: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, N, C). Returns (B, Q, C) in the dtype of x, summed in float32 at least."""
        source = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))  # (BN, C)
        out = _Gather.apply(source, self.rows, self.weights.to(source.dtype))
        return out.unflatten(0, (self.batch, -1)).to(x.dtype)  # (BQ, C) -> (B, Q, C)


class _Gather(torch.autograd.Function):
    """Σ_k weights(q, k) · x(rows(q, k)). Its gradient gathers too: no sum depends on the order of threads."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.source_rows = len(x)
        return F.embedding_bag(rows, x, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows, weights = ctx.saved_tensors
        readers, order = rows.flatten().sort(stable=True)
        numbers = torch.arange(ctx.source_rows + 1, dtype=rows.dtype, device=rows.device)
        ends = torch.searchsorted(readers, numbers)
        dx = F.embedding_bag(
            order.div(rows.shape[1], rounding_mode="floor"),
            gradient.contiguous(),
            ends,
            per_sample_weights=weights.flatten()[order],
            mode="sum",
            include_last_offset=True,
        )
        return dx, None, None


def batched(batch: int, rows_per_item: int, index: torch.Tensor, weights: torch.Tensor) -> WeightedGather:
    """The gather from rows `index` (B or 1, Q, K), counted within an item, and weights of the same shape."""
    if batch == 1:
        return WeightedGather(1, index.flatten(0, 1), weights.flatten(0, 1))
    first = torch.arange(batch, dtype=index.dtype, device=index.device) * rows_per_item
    rows = (index + first[:, None, None]).flatten(0, 1)  # (BQ, K)
    return WeightedGather(batch, rows, weights.expand(batch, -1, -1).flatten(0, 1))


def points_to_grid(
    points: Points, batch: int, grid: Size, neighbours: int, convention: CoordinateConvention, device: torch.device
) -> WeightedGather:
    """Features (B, M, C) to grid nodes (B, U_h·U_w, C): mean of the K nearest points weighted by 1 / max(d², 1e-16).

    Raises ValueError when there are fewer than K points.
    """
    return batched(batch, points.count, *nearest_weights(points, grid, neighbours, convention, device))


def nearest_weights(
    points: Points, grid: Size, neighbours: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the nearest points in their list and the weights of `points_to_grid`: (B or 1, Q, K) each."""
    rows, squared = nearest_rows(points, grid, neighbours, convention, device)
    weights = 1 / squared.clamp(min=_CLOSEST)
    return rows, weights / weights.sum(2, keepdim=True)


def grid_to_points(
    points: Points, batch: int, grid: Size, convention: CoordinateConvention, device: torch.device
) -> WeightedGather:
    """Grid features (B, U_h·U_w, C) to points (B, M, C): bilinear, read where the convention says."""
    geometry = (grid, convention, device)
    reads = _full_lattice_reads(points.size, *geometry) if points.index is None else _bilinear_reads(points, *geometry)
    return batched(batch, grid[0] * grid[1], *reads)


def _bilinear_reads(
    points: Points, grid: Size, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The four nodes around each point and their weights: (B or 1, M, 4) each."""
    rows, cols = points.rows_cols(device)  # (B or 1, M) each
    rows = convention.pixel_coordinate(rows, points.size[0])
    cols = convention.pixel_coordinate(cols, points.size[1])
    x, y = convention.grid_read_position(rows, cols)
    row, row_weight = _linear_taps(y, grid[0], convention)  # (B or 1, M, 2) each
    col, col_weight = _linear_taps(x, grid[1], convention)
    index = row.unsqueeze(3) * grid[1] + col.unsqueeze(2)  # (B or 1, M, 2, 2)
    weights = row_weight.unsqueeze(3) * col_weight.unsqueeze(2)
    return index.flatten(2), weights.flatten(2)


@lru_cache(maxsize=2)
def _full_lattice_reads(
    size: Size, grid: Size, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_bilinear_reads` of a full lattice, which every step of a sampler asks for; int32 if that will do."""
    index, weights = _bilinear_reads(Points(size), grid, convention, device)
    return index.int() if index.numel() < 2**31 else index, weights


def _linear_taps(position: torch.Tensor, n: int, convention: CoordinateConvention) -> tuple[torch.Tensor, torch.Tensor]:
    """The two nodes of an axis of n around positions in grid_sample's [-1, 1], and their weights: (…, 2) each."""
    if convention.align_corners:
        place = (position + 1) * (n - 1) / 2
    else:
        place = ((position + 1) * n - 1) / 2
    if convention.padding_mode == "border":
        place = place.clamp(0, n - 1)
    lower = place.floor()
    fraction = place - lower
    nodes = torch.stack([lower, lower + 1], dim=-1).long()
    weights = torch.stack([1 - fraction, fraction], dim=-1)
    inside = (nodes >= 0) & (nodes < n)  # what lies beyond counts zero; under "border" its weight is zero already
    return nodes.clamp(0, n - 1), weights * inside


def interpolate_to_grid(
    x: torch.Tensor, points: Points, grid: Size, neighbours: int, convention: CoordinateConvention
) -> torch.Tensor:
    """Features (B, M, C) at points as an image (B, C, U_h, U_w), by `points_to_grid`."""
    out = points_to_grid(points, x.shape[0], grid, neighbours, convention, x.device)(x)  # (B, Q, C)
    return out.transpose(1, 2).unflatten(2, grid)
