"""The convolution of `sparse_conv.backend` between two sets of points, for wide windows with few points in them.

It computes, at the target points p, with S the source points and W the window of 3 × 3 pixels of an s × s lattice,

    out(p) = bias + 9 / Σ_{q ∈ S ∩ W} c(q − p) · Σ_{q ∈ S ∩ W} weight(q − p) · x(q),

with the kernel resampled to the lattice the points lie on. The resampling is linear, so every pair (p, q) is shared
out to the taps of the 3 × 3 kernel first: the cost follows the pairs, not the pixels of the window.

Letters: B batch, C channels, N source points, M target points, P pairs, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from diffusion.coordinates import CoordinateConvention, Points, Size
from models.operators.sparse_conv.backend import coverage, kernel_window, resample_kernel

_SIDE = 3  # of the kernel, as in the grid's convolutions
_TAPS = _SIDE * _SIDE


@dataclass(frozen=True, eq=False)
class Stencil:
    """What each tap of each target reads: sums over its entries of weights · x(rows), rows counted through the batch.

    batch: B. sources: N. rows: int64 (E,), ordered by target and tap. ends: int64 (B·M·9 + 1,), where the entries of a
    tap begin, and the end. weights: float32 (E,).
    """

    batch: int
    sources: int
    rows: torch.Tensor
    ends: torch.Tensor
    weights: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, N, C). Returns (B, M, 9·C) in the dtype of x, summed in float32 at least."""
        source = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))  # (BN, C)
        taps = F.embedding_bag(
            self.rows,
            source,
            self.ends,
            per_sample_weights=self.weights.to(source.dtype),
            mode="sum",
            include_last_offset=True,
        )
        return taps.view(self.batch, -1, _TAPS * x.shape[2]).to(x.dtype)  # (BM·9, C) -> (B, M, 9C)

    def expand(self, batch: int) -> Stencil:
        """The stencil of one item (B = 1) for a batch of items with the same points."""
        if self.batch == batch:
            return self
        item = torch.arange(batch, device=self.rows.device)[:, None]
        rows = (self.rows + item * self.sources).flatten()
        ends = (self.ends[1:] + item * len(self.rows)).flatten()
        return Stencil(batch, self.sources, rows, F.pad(ends, (1, 0)), self.weights.repeat(batch))


def stencil_between(sources: Points, targets: Points, side: int, convention: CoordinateConvention) -> Stencil:
    """The stencil of a 3 × 3 kernel of an s × s lattice between points of one lattice.

    sources: index (B, N). targets: index (B, M). side: s. A target without sources in its window reads nothing.
    """
    table, covered = _tap_table(sources.size, side, convention, sources.index.device)
    parts = [
        _entries(source, target, table, covered)
        for source, target in zip(_positions(sources), _positions(targets), strict=True)
    ]
    rows, bags, weights = zip(*parts)
    batch, bags_each = len(parts), targets.count * _TAPS
    rows = torch.cat([row + b * sources.count for b, row in enumerate(rows)])
    counts = torch.cat([bag.bincount(minlength=bags_each) for bag in bags])
    return Stencil(batch, sources.count, rows, F.pad(counts.cumsum(0), (1, 0)), torch.cat(weights))


def _tap_table(
    size: Size, side: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each tap contributes at each offset of the window, (k'_h, k'_w, 9), and c there, float64 (k'_h, k'_w)."""
    kernel_shape, span = kernel_window(_SIDE, size, (side, side), convention)
    taps = torch.eye(_TAPS, device=device).view(_TAPS, 1, _SIDE, _SIDE)
    covered = coverage(kernel_shape, span or kernel_shape, device)
    return resample_kernel(taps, kernel_shape, span).squeeze(1).permute(1, 2, 0), covered


def _positions(points: Points) -> list[torch.Tensor]:
    """Row and column of the points of each item: B tensors (2, M)."""
    return list(torch.stack(points.rows_cols(), dim=1).int())


def _entries(
    source: torch.Tensor, target: torch.Tensor, table: torch.Tensor, covered: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, tap numbers 9·target + tap, ascending, and weights of the entries of one item: (E,) each."""
    row, col = source[:, None, :] - target[:, :, None]  # offsets, (M, N) each
    reach = (covered.shape[0] // 2, covered.shape[1] // 2)
    inside = (row.abs() <= reach[0]) & (col.abs() <= reach[1])
    to, of = inside.nonzero(as_tuple=True)  # (P,) each
    offset = (row[to, of] + reach[0], col[to, of] + reach[1])
    ends, area = (F.pad(t.cumsum(0), (1, 0)) for t in (inside.sum(1), covered[offset]))
    density = (area[ends].diff() / _TAPS).to(table.dtype)[to]  # (P,)
    weights = table[offset] / density[:, None]  # (P, 9)
    pair, tap = weights.nonzero(as_tuple=True)  # (E,)
    bags = to[pair] * _TAPS + tap
    bags, order = bags.sort(stable=True)
    return of[pair][order], bags, weights[pair, tap][order]


class PointConv(nn.Conv2d):
    """The convolution of this module, with the parameters of a 3 × 3 `Conv2d`. Features are (B, M, 1, C)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, _SIDE)

    def forward(self, x: torch.Tensor, stencil: Stencil) -> torch.Tensor:
        """x: (B, N, 1, C_in) at the sources. Returns (B, M, 1, C_out) at the targets."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C_out, 9·C_in), taps first
        return F.linear(stencil(x.squeeze(2)), weight, self.bias).unsqueeze(2)
