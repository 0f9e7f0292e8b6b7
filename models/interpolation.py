"""Between points and coarse grid: inverse-distance weighting one way, bilinear reading the other (paper, section 4.1).

Both are sparse linear maps with a few entries per output, fixed once the points are known. Positions and weights are
float32 in every precision and carry no gradient. Letters: B batch, C channels, M points, N source rows, Q output
rows, U_h × U_w grid, K nearest points, E entries of all outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from diffusion.coordinates import CoordinateConvention, Points, Size
from models.operators import dispatch
from models.operators.knn.search import Nearest, nearest_rows

_CLOSEST = 1e-16  # squared distance below which a pixel coincides with a node, and then counts alone


@dataclass(frozen=True, eq=False)
class WeightedGather:
    """out(b, q) = Σ_e weights(e) · x(rows(e)) over the entries e of the output b·Q + q.

    batch: B. rows: integers (E,), counted through the batch laid end to end. ends: like rows, (B·Q + 1,), where the
    entries of an output begin, and the end. weights: float32 (E,). plain: compute gradients in PyTorch wherever it is.
    """

    batch: int
    rows: torch.Tensor
    ends: torch.Tensor
    weights: torch.Tensor
    plain: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, N, C). Returns (B, Q, C) in the dtype of x, summed in float32 at least."""
        source = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))  # (BN, C)
        out = _Gather.apply(source, self.rows, self.ends, self.weights.to(source.dtype), self.plain)
        return out.unflatten(0, (self.batch, -1)).to(x.dtype)  # (BQ, C) -> (B, Q, C)

    def expand(self, batch: int, rows_per_item: int) -> WeightedGather:
        """The gather of one item (B = 1) from `rows_per_item` rows for a batch of such items."""
        if self.batch == batch:
            return self
        item = torch.arange(batch, dtype=self.rows.dtype, device=self.rows.device)[:, None]
        ends = (self.ends[1:] + item * len(self.rows)).flatten()
        rows, weights = (self.rows + item * rows_per_item).flatten(), self.weights.expand(batch, -1).flatten()
        return WeightedGather(batch, rows, F.pad(ends, (1, 0)), weights, self.plain)

    def some(self, outputs: torch.Tensor) -> WeightedGather:
        """Of these outputs alone, int64 (B, M) within each item; the shapes depend on values."""
        counts = self.ends.diff()
        first = torch.arange(0, len(counts), len(counts) // self.batch, device=counts.device)
        wanted = (outputs + first[:, None]).flatten()
        counts, first = counts[wanted], self.ends[wanted]
        ends = F.pad(counts.cumsum(0), (1, 0))
        entries = (first - ends[:-1]).repeat_interleave(counts)
        entries += torch.arange(len(entries), device=entries.device)
        return WeightedGather(self.batch, self.rows[entries], ends, self.weights[entries], self.plain)


class _Gather(torch.autograd.Function):
    """The sums of `WeightedGather`. Their gradient gathers too: no sum depends on the order of threads."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor, plain: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, ends, weights)
        ctx.source_rows, ctx.plain = len(x), plain
        return _sums(x, rows, ends, weights)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        rows, ends, weights = ctx.saved_tensors
        order, begins = _transposed(rows, ctx.source_rows, ctx.plain)
        outputs = _spread(torch.arange(len(ends) - 1, device=rows.device), ends, len(rows))
        return _sums(gradient.contiguous(), outputs[order], begins, weights[order]), None, None, None, None


def _sums(x: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return F.embedding_bag(rows, x, ends, per_sample_weights=weights, mode="sum", include_last_offset=True)


def _transposed(rows: torch.Tensor, source_rows: int, plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries in the order of the rows they read, int64 (E,), and where those of each row begin, int64 (N + 1,)."""
    kernels = dispatch.kernels("transposition", rows.device.type, plain)
    if kernels is not None:
        return kernels.transposed(rows, source_rows)
    readers, order = rows.sort(stable=True)
    numbers = torch.arange(source_rows + 1, dtype=rows.dtype, device=rows.device)
    return order, torch.searchsorted(readers, numbers)


def _spread(values: torch.Tensor, ends: torch.Tensor, entries: int) -> torch.Tensor:
    """Values of outputs to their entries."""
    return values.repeat_interleave(ends.diff(), output_size=entries)


def points_to_grid(
    points: Points,
    batch: int,
    grid: Size,
    k: int,
    convention: CoordinateConvention,
    device: torch.device,
    plain: bool = False,
) -> WeightedGather:
    """Features (B, M, C) to grid nodes (B, U_h·U_w, C): mean of the nearest points weighted by s / max(d², 1e-16).

    The nearest points and their shares s are those of `models.operators.knn.search`, plain as there. Raises ValueError
    when there are fewer than K points.
    """
    if points.index is None:
        averages, items = _full_lattice_averages(tuple(points.size), grid, k, convention, device), 1
    else:
        averages = _averages(nearest_rows(points, grid, k, convention, device, plain))
        items = len(points.index)
    return WeightedGather(items, *averages, plain).expand(batch, points.count)


@lru_cache(maxsize=4)
def _full_lattice_averages(
    size: Size, grid: Size, k: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`_averages` of a full lattice, which every step of a sampler asks for."""
    with torch.inference_mode(False):  # gradients may want them later
        return _averages(nearest_rows(Points(size), grid, k, convention, device))


def _averages(nearest: Nearest) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, ends and weights of the gather that takes weighted means."""
    rows, squared, shares, ends = nearest
    weights = shares / squared.clamp(min=_CLOSEST)
    every = torch.arange(len(rows), device=rows.device)
    sums = _sums(weights.unsqueeze(1), every, ends, torch.ones_like(weights)).squeeze(1)
    weights /= _spread(sums, ends, len(rows))
    return rows, ends, weights


def grid_to_points(
    points: Points,
    batch: int,
    grid: Size,
    convention: CoordinateConvention,
    device: torch.device,
    plain: bool = False,
) -> WeightedGather:
    """Grid features (B, U_h·U_w, C) to points (B, M, C): bilinear, read where the convention says; plain as above."""
    geometry = (grid, convention, device)
    reads = _full_lattice_reads(points.size, *geometry) if points.index is None else _bilinear_reads(points, *geometry)
    index, weights = reads  # (B or 1, M, 4) each
    if len(index) > 1:
        index = index + (grid[0] * grid[1] * torch.arange(len(index), device=device))[:, None, None]
    ends = torch.arange(0, index.numel() + 1, 4, dtype=index.dtype, device=device)
    gather = WeightedGather(len(index), index.flatten(), ends, weights.flatten(), plain)
    return gather.expand(batch, grid[0] * grid[1])


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
    x: torch.Tensor,
    points: Points,
    grid: Size,
    k: int,
    convention: CoordinateConvention,
    plain: bool = False,
) -> torch.Tensor:
    """Features (B, M, C) at points as an image (B, C, U_h, U_w), by `points_to_grid`."""
    out = points_to_grid(points, x.shape[0], grid, k, convention, x.device, plain)(x)  # (B, Q, C)
    return out.transpose(1, 2).unflatten(2, grid)
