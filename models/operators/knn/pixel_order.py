"""The order in which nodes of a coarse grid see the pixels of a lattice, present or not: nearest first, ties by id.

All comparisons are between integers: `CoordinateConvention.integer_geometry` puts pixels and nodes of an axis on one
integer lattice, and the two axes are brought to a common denominator. Distances are in the unit square, also when
H ≠ W. Letters: H × W lattice, U_h × U_w grid of Q = U_h·U_w nodes, L length of the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from diffusion.coordinates import CoordinateConvention, Size

_CHUNK = 1 << 22  # distances held at a time


class PixelTable(NamedTuple):
    """Pixels in the order in which the nodes see them, present or not.

    ids: int64 (Q, L). squared: float32 (Q, L), distances in the unit square. begins, ends: int64 (Q, L), the columns of
    the pixels that share the weight of this one if it is the K-th: of all at its distance, which may end beyond L, or
    where ties are not shared of this one.
    """

    ids: torch.Tensor
    squared: torch.Tensor
    begins: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True, eq=False)
class Geometry:
    """Integer positions per axis: pixels (H,), (W,) and nodes (U_h,), (U_w,), all over the common `denominator`."""

    pixel_rows: torch.Tensor
    pixel_cols: torch.Tensor
    node_rows: torch.Tensor
    node_cols: torch.Tensor
    denominator: int

    @property
    def axes(self) -> list[torch.Tensor]:
        return [self.pixel_rows, self.pixel_cols, self.node_rows, self.node_cols]

    @property
    def fits_int64(self) -> bool:
        """Whether all squared distances do."""
        return 2 * self.denominator**2 < 2**63

    def offsets(self, nodes: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column differences between nodes (numbered row-major) and pixels, of broadcastable int64 shapes."""
        width, grid_width = len(self.pixel_cols), len(self.node_cols)
        rows = self.node_rows[nodes // grid_width] - self.pixel_rows[ids // width]
        return rows, self.node_cols[nodes % grid_width] - self.pixel_cols[ids % width]

    def in_unit_square(self, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        """Squared distances, float32, of such differences."""
        return (rows.float() / self.denominator).square() + (cols.float() / self.denominator).square()


@lru_cache(maxsize=16)
def geometry_of(size: Size, grid: Size, convention: CoordinateConvention, device: torch.device) -> Geometry:
    pixel_rows, node_rows, rows_over = convention.integer_geometry(size[0], grid[0])
    pixel_cols, node_cols, cols_over = convention.integer_geometry(size[1], grid[1])
    common = math.lcm(rows_over, cols_over)
    scaled = [axis * (common // rows_over) for axis in (pixel_rows, node_rows)]
    scaled += [axis * (common // cols_over) for axis in (pixel_cols, node_cols)]
    pixel_rows, node_rows, pixel_cols, node_cols = (axis.to(device) for axis in scaled)
    return Geometry(pixel_rows, pixel_cols, node_rows, node_cols, common)


@lru_cache(maxsize=16)
def ordered_pixels(
    size: Size, grid: Size, length: int, convention: CoordinateConvention, device: torch.device
) -> PixelTable:
    """The L nearest pixels of every node, present or not, by (distance, id)."""
    geometry = geometry_of(size, grid, convention, torch.device("cpu"))
    # Half a disc must hold L pixels, because nodes on an edge see only half of it.
    radius = math.sqrt(2 * length / (math.pi * size[0] * size[1]))
    while True:
        reach = (math.ceil(radius * size[0]), math.ceil(radius * size[1]))
        step = max(_CHUNK // (grid[1] * (2 * reach[0] + 1) * (2 * reach[1] + 1)), 1)
        parts = [_sorted_window(geometry, rows, reach, length) for rows in torch.arange(grid[0]).split(step)]
        if all(part is not None for part in parts):
            ids, begins, ends = map(torch.cat, zip(*parts))
            if not convention.shares_ties:
                begins = torch.arange(length).expand_as(ids).contiguous()
                ends = begins + 1
            squared = geometry.in_unit_square(*geometry.offsets(torch.arange(len(ids))[:, None], ids))
            return PixelTable(*(part.to(device) for part in (ids, squared, begins, ends)))
        radius *= 1.25


def _sorted_window(geometry: Geometry, rows: torch.Tensor, reach: Size, length: int) -> tuple[torch.Tensor, ...] | None:
    """Ids, begins and ends of `PixelTable` for some rows of nodes, from windows of pixels; None unless certain.

    Pixels outside the window differ by a whole window side in rows or in columns, so those strictly nearer than the
    nearest excluded row and column come first among all pixels, and all at their distances are in the window.
    """
    row_ids, row_offsets, row_bound = _axis_window(geometry.pixel_rows, geometry.node_rows[rows], reach[0])
    col_ids, col_offsets, col_bound = _axis_window(geometry.pixel_cols, geometry.node_cols, reach[1])
    shape = (len(rows) * len(col_ids), -1)
    distance = row_offsets[:, None, :, None].square() + col_offsets[None, :, None, :].square()
    distance = distance.reshape(shape)  # (q, window), pixel ids ascending
    if distance.shape[1] < length:
        return None
    ids = (row_ids[:, None, :, None] * len(geometry.pixel_cols) + col_ids[None, :, None, :]).reshape(shape)
    distance, order = distance.sort(dim=1, stable=True)
    bound = torch.minimum(row_bound[:, None], col_bound[None, :]).reshape(-1)  # (q,)
    first = distance[:, :length].contiguous()
    if bool((first[:, -1] >= bound.square()).any()):
        return None
    begins, ends = (torch.searchsorted(distance, first, right=right) for right in (False, True))
    return ids.gather(1, order[:, :length]), begins, ends


def _axis_window(pixels: torch.Tensor, nodes: torch.Tensor, reach: int) -> tuple[torch.Tensor, ...]:
    """Window of pixels around each node along one axis, kept inside the lattice.

    Returns pixel numbers (u, w), their offsets from the node (u, w), and the distance (u,) to the nearest pixel left
    out.
    """
    count = min(2 * reach + 1, len(pixels))
    nearest = (nodes[:, None] - pixels).abs().argmin(1)
    start = (nearest - reach).clamp(0, len(pixels) - count)
    ids = start[:, None] + torch.arange(count)
    infinite = torch.full_like(nodes, 1 << 31)  # its square, 2^62, is beyond every distance that fits int64 twice
    below = (nodes - pixels[(start - 1).clamp(min=0)]).abs().where(start > 0, infinite)
    after = start + count
    above = (nodes - pixels[after.clamp(max=len(pixels) - 1)]).abs().where(after < len(pixels), infinite)
    return ids, nodes[:, None] - pixels[ids], torch.minimum(below, above)
