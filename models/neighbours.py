"""Exact nearest present pixels of every node of a coarse grid.

All comparisons are between integers: `CoordinateConvention.integer_geometry` puts pixels and nodes of an axis on one
integer lattice, and the two axes are brought to a common denominator. Pixels are ordered by (distance, pixel id), a
total order, so the neighbours are uniquely defined even where distances tie. Distances are in the unit square, also
when H ≠ W.

Letters: B batch, M points, H × W lattice, U_h × U_w grid of Q = U_h·U_w nodes, K neighbours, L length of the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from diffusion.coordinates import CoordinateConvention, Points, Size
from models.operators import dispatch

# The first L pixels hold K present ones but for about one node in 10⁶ when L·M/(H·W) ≥ 5·K (binomial tail, K = 3).
_EXPECTED_PER_NEIGHBOUR = 5
_LONGEST_TABLE = 1024  # entries per node; sparser points are searched directly, which is then cheaper and smaller
_CHUNK = 1 << 22  # distances held at a time


@dataclass(frozen=True, eq=False)
class _Geometry:
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


@lru_cache(maxsize=16)
def _geometry(size: Size, grid: Size, convention: CoordinateConvention, device: torch.device) -> _Geometry:
    pixel_rows, node_rows, rows_over = convention.integer_geometry(size[0], grid[0])
    pixel_cols, node_cols, cols_over = convention.integer_geometry(size[1], grid[1])
    common = math.lcm(rows_over, cols_over)
    scaled = [axis * (common // rows_over) for axis in (pixel_rows, node_rows)]
    scaled += [axis * (common // cols_over) for axis in (pixel_cols, node_cols)]
    pixel_rows, node_rows, pixel_cols, node_cols = (axis.to(device) for axis in scaled)
    return _Geometry(pixel_rows, pixel_cols, node_rows, node_cols, common)


def nearest_points(
    points: Points, grid: Size, neighbours: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K nearest present pixels of every grid node, nearest first, ties by pixel id.

    Returns pixel ids, int64 (B, Q, K), and squared distances in the unit square, float32 (B, Q, K); the leading axis
    is 1 for the full lattice, whose answer is static and cached. Raises ValueError when there are fewer than K
    points.
    """
    ids, _, squared = _nearest(points, grid, neighbours, convention, device)
    return ids, squared


def nearest_rows(
    points: Points, grid: Size, neighbours: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`nearest_points` with places in the list of points, int64 (B, Q, K), instead of pixel ids."""
    ids, rows, squared = _nearest(points, grid, neighbours, convention, device)
    if rows is None:
        order = torch.arange(points.count, device=device).expand(ids.shape[0], -1)
        place = torch.zeros(ids.shape[0], points.size[0] * points.size[1], dtype=torch.int64, device=device)
        rows = place.scatter_(1, points.index, order).gather(1, ids.flatten(1)).view_as(ids)
    return rows, squared


def _nearest(
    points: Points, grid: Size, neighbours: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Pixel ids, places in the list of points where they come at no cost, and squared distances."""
    if points.count < neighbours:
        raise ValueError(f"there are {points.count} points; model.knn_neighbours={neighbours} needs at least as many")
    if points.index is None:
        ids, squared = _nearest_on_full_lattice(points.size, grid, neighbours, convention, device)
        return ids, ids, squared
    geometry = _geometry(points.size, grid, convention, device)
    pixels = points.size[0] * points.size[1]
    wanted = _EXPECTED_PER_NEIGHBOUR * neighbours * pixels / points.count
    length = min(1 << math.ceil(math.log2(wanted)), pixels)  # powers of two: few tables serve all densities
    if geometry.fits_int64 and pixels < 2**31 and (kernels := _kernels(device.type)) is not None:
        # Twice as long: the kernel reads no further than it must, and is slow where it has to search.
        length = min(2 * length, pixels, _LONGEST_TABLE) if length <= _LONGEST_TABLE else 0
        table = _table(points.size, grid, length, convention, device)
        return kernels.nearest_present(points.index, table, geometry.axes, geometry.denominator, neighbours)
    if length > _LONGEST_TABLE:
        ids = _search_all(points.index, grid, neighbours, geometry)
    else:
        table = _nearest_pixels(points.size, grid, length, convention, device)
        ids = _first_present(points.index, table, neighbours, pixels, geometry)
    return ids, None, _squared_distances(ids, geometry)


def _kernels(device_type: str) -> ModuleType | None:
    """The look-up in Triton, on a GPU if it can be: the other asks the device which nodes to search for."""
    return dispatch.kernels("nearest points", device_type)


@lru_cache(maxsize=16)
def _table(size: Size, grid: Size, length: int, convention: CoordinateConvention, device: torch.device) -> torch.Tensor:
    """`_nearest_pixels` as int32 (L, Q): nodes next to each other, as the lanes of a GPU read them. L may be 0."""
    if length == 0:
        return torch.empty(0, grid[0] * grid[1], dtype=torch.int32, device=device)
    return _nearest_pixels(size, grid, length, convention, torch.device("cpu")).t().int().contiguous().to(device)


@lru_cache(maxsize=16)
def _nearest_on_full_lattice(
    size: Size, grid: Size, neighbours: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = _nearest_pixels(size, grid, neighbours, convention, device).unsqueeze(0)  # (1, Q, K)
    return ids, _squared_distances(ids, _geometry(size, grid, convention, device))


def _squared_distances(ids: torch.Tensor, geometry: _Geometry) -> torch.Tensor:
    nodes = torch.arange(ids.shape[1], device=ids.device)[:, None]  # (Q, 1)
    rows, cols = geometry.offsets(nodes, ids)
    return (rows / geometry.denominator).square() + (cols / geometry.denominator).square()


def _first_present(
    index: torch.Tensor, table: torch.Tensor, neighbours: int, pixels: int, geometry: _Geometry
) -> torch.Tensor:
    """The first K entries of each row of `table` (Q, L) in `index` (B, M); nodes whose row runs out are searched."""
    batch, (nodes, length) = index.shape[0], table.shape
    present = torch.zeros(batch, pixels, dtype=torch.uint8, device=index.device).scatter_(1, index, 1)
    seen = present.index_select(1, table.flatten()).view(batch * nodes, length)
    seen = seen.cumsum(1, dtype=torch.int16)  # (BQ, L): present pixels up to and including each column
    ranks = torch.arange(1, neighbours + 1, dtype=torch.int16, device=index.device)
    columns = torch.searchsorted(seen, ranks.expand(batch * nodes, -1).contiguous()).view(batch, nodes, -1)
    ids = table.expand(batch, -1, -1).gather(2, columns.clamp(max=length - 1))  # (B, Q, K)
    starved = (columns[:, :, -1] == length).nonzero()  # (S, 2) of (image, node)
    if len(starved):
        image, node = starved.unbind(1)
        ids[image, node] = search(node, index, neighbours, geometry, image)
    return ids


def _search_all(index: torch.Tensor, grid: Size, neighbours: int, geometry: _Geometry) -> torch.Tensor:
    nodes = torch.arange(grid[0] * grid[1], device=index.device)
    found = [search(nodes, row.unsqueeze(0), neighbours, geometry, torch.zeros_like(nodes)) for row in index]
    return torch.stack(found)  # (B, Q, K)


def search(
    nodes: torch.Tensor, index: torch.Tensor, neighbours: int, geometry: _Geometry, image: torch.Tensor
) -> torch.Tensor:
    """Brute force: the first K of the pixels `index[image]` (S, M) by (distance to `nodes` (S,), pixel id); (S, K)."""
    if not geometry.fits_int64:
        raise ValueError(
            f"a {len(geometry.pixel_rows)}x{len(geometry.pixel_cols)} lattice and a {len(geometry.node_rows)}x"
            f"{len(geometry.node_cols)} grid have no common pitch that fits int64; take sides with common factors"
        )
    found = []
    step = max(_CHUNK // index.shape[1], 1)
    for part, owner in zip(nodes.split(step), image.split(step)):
        ids = index[owner]  # (s, M)
        rows, cols = geometry.offsets(part[:, None], ids)
        distance = rows.square() + cols.square()
        chosen = []
        for _ in range(neighbours):
            nearest = distance.amin(1, keepdim=True)
            best = ids.where(distance == nearest, torch.iinfo(torch.int64).max).amin(1, keepdim=True)  # (s, 1)
            chosen.append(best)
            distance = distance.masked_fill(ids == best, torch.iinfo(torch.int64).max)
        found.append(torch.cat(chosen, dim=1))
    return torch.cat(found)


@lru_cache(maxsize=16)
def _nearest_pixels(
    size: Size, grid: Size, length: int, convention: CoordinateConvention, device: torch.device
) -> torch.Tensor:
    """Ids of the L nearest pixels of every node, present or not, by (distance, id): int64 (Q, L)."""
    geometry = _geometry(size, grid, convention, torch.device("cpu"))
    # Half a disc must hold L pixels, because nodes on an edge see only half of it.
    radius = math.sqrt(2 * length / (math.pi * size[0] * size[1]))
    while True:
        reach = (math.ceil(radius * size[0]), math.ceil(radius * size[1]))
        step = max(_CHUNK // (grid[1] * (2 * reach[0] + 1) * (2 * reach[1] + 1)), 1)
        parts = [_sorted_window(geometry, rows, reach, length) for rows in torch.arange(grid[0]).split(step)]
        if all(part is not None for part in parts):
            return torch.cat(parts).to(device)
        radius *= 1.25


def _sorted_window(geometry: _Geometry, rows: torch.Tensor, reach: Size, length: int) -> torch.Tensor | None:
    """`_nearest_pixels` of some rows of nodes from a window of pixels around each; None unless all L are certain.

    Pixels outside the window differ by a whole window side in rows or in columns, so those strictly nearer than the
    nearest excluded row and column come first among all pixels.
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
    if bool((distance[:, length - 1] >= bound.square()).any()):
        return None
    return ids.gather(1, order[:, :length])


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
