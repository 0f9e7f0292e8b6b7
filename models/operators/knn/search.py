"""Exact nearest present pixels of every node of a coarse grid.

Pixels are ordered by (distance, pixel id), a total order in exact integers (`pixel_order`), so the nearest are
uniquely defined.

Of the pixels at the K-th distance, K leaves room for j of the J that are present. Under a convention that shares ties
all J are taken and count j / J each, so that no pixel is left out for its id; else the first j are. At most W pixels
are taken, the first in the order: W = K − 1 + T, with T the most pixels at one distance from any node, as far as
distances are looked up and up to `_MOST_TIED`.

Letters: B batch, M points, H × W lattice, U_h × U_w grid of Q = U_h·U_w nodes, K nearest points, W width of the gather,
L length of the table.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion.coordinates import CoordinateConvention, Points, Size
from models.operators import dispatch
from models.operators.knn import cpu_search
from models.operators.knn.pixel_order import Geometry, PixelTable, geometry_of, ordered_pixels

# The first L pixels hold K present ones but for about one node in 10⁶ when L·M/(H·W) ≥ 5·K (binomial tail, K = 3).
_EXPECTED_PER_K = 5
_LONGEST_TABLE = 1024  # entries per node; sparser points are searched directly, which is then cheaper and smaller
_CHUNK = 1 << 22  # distances held at a time
# More points at one distance from a node do not occur by chance: at 1/4 of 256 × 256 pixels there are at most 12 unless
# the 64 pixels nearest to a node hold fewer than K points.
_MOST_TIED = 16


class Nearest(NamedTuple):
    """What each node reads of the pixels, nearest first, ties by pixel id: E entries, node by node, image by image.

    pixels: int64 (E,), their ids or their places in the list of points. squared: float32 (E,), squared distances in the
    unit square.
    shares: float32 (E,), the fraction of its weight with which each counts: 1, or j / J at the K-th distance, or 0 for
    padding, which repeats the nearest. Those of a node add up to K.
    ends: int64 (B·Q + 1,), where the entries of a node begin, and the end; B is 1 for a full lattice.
    """

    pixels: torch.Tensor
    squared: torch.Tensor
    shares: torch.Tensor
    ends: torch.Tensor


class _Entries(NamedTuple):
    """Entries of some nodes in any order: int64 (e,) nodes, ranks and pixel ids, float32 (e,) squared distances."""

    node: torch.Tensor
    rank: torch.Tensor
    ids: torch.Tensor
    squared: torch.Tensor


def nearest_points(
    points: Points,
    grid: Size,
    k: int,
    convention: CoordinateConvention,
    device: torch.device,
    plain: bool = False,
) -> Nearest:
    """The K nearest present pixels of every grid node, by their ids, with those tied at the K-th distance.

    That of the full lattice is static and cached. Listed points are padded to W a node where Triton looks them up, so
    that no shape depends on a value. plain: compute in PyTorch wherever it is. Raises ValueError when there are fewer
    than K points.
    """
    return _nearest(points, grid, k, convention, device, plain)[0]


def nearest_rows(
    points: Points,
    grid: Size,
    k: int,
    convention: CoordinateConvention,
    device: torch.device,
    plain: bool = False,
) -> Nearest:
    """`nearest_points` with places in the list of points, through the batch laid end to end, instead of pixel ids."""
    found, rows = _nearest(points, grid, k, convention, device, plain)
    if rows is None:
        assert points.index is not None  # pixels of a full lattice are in their order
        pixels = points.size[0] * points.size[1]
        first = pixels * torch.arange(points.index.shape[0], device=device)  # of each image
        order = torch.arange(points.index.numel(), device=device)
        place = order.new_zeros(len(first) * pixels).scatter_(0, (points.index + first[:, None]).flatten(), order)
        counts = found.ends[:: grid[0] * grid[1]].diff()  # entries of each image
        ids = found.pixels + first.repeat_interleave(counts, output_size=len(found.pixels))
        rows = place.index_select(0, ids)
    return found._replace(pixels=rows)


def _nearest(
    points: Points,
    grid: Size,
    k: int,
    convention: CoordinateConvention,
    device: torch.device,
    plain: bool = False,
) -> tuple[Nearest, torch.Tensor | None]:
    """The nearest by pixel ids, and their places in the list of points where they come at no cost."""
    if points.count < k:
        raise ValueError(f"model.knn_neighbours is {k}; accepted: 1 to {points.count}, the number of points")
    if points.index is None:
        found = _nearest_on_full_lattice(points.size, grid, k, convention, device)
        return found, found.pixels
    geometry = geometry_of(points.size, grid, convention, device)
    pixels, nodes = points.size[0] * points.size[1], grid[0] * grid[1]
    wanted = _EXPECTED_PER_K * k * pixels / points.count
    length = min(1 << math.ceil(math.log2(wanted)), pixels)  # powers of two: few tables serve all densities
    most = _most_tied(points.size, grid, length, convention)
    width = min(k - 1 + most, points.count)
    # Triton on a GPU, where PyTorch has to ask the device which nodes to search for; C on a CPU.
    kernels = dispatch.kernels("nearest points", device.type, plain)
    in_c = kernels is cpu_search
    if kernels is not None and not in_c and geometry.fits_int64 and pixels < 2**31:
        # Twice as long: the kernel reads no further than it must, and is slow where it has to search.
        length = min(2 * length, pixels, _LONGEST_TABLE) if length <= _LONGEST_TABLE else 0
        columns = _columns(points.size, grid, length, convention, device)
        axes, denominator = geometry.axes, geometry.denominator
        found = kernels.nearest_present(points.index, *columns, axes, denominator, k, width)
        ids, rows, squared, shares = found
        rows += (points.count * torch.arange(len(rows), device=device))[:, None, None]
        ends = torch.arange(0, ids.numel() + 1, width, device=device)
        return Nearest(ids.flatten(), squared.flatten(), shares.flatten(), ends), rows.flatten()
    if length > _LONGEST_TABLE:
        every = torch.arange(len(points.index) * nodes, device=device)
        before, counts, entries = search(every, points.index, k, width, geometry)
        return _assembled(before, counts, k, entries), None
    table = ordered_pixels(points.size, grid, length, convention, device)
    if in_c and (parts := cpu_search.first_present(points.index, points.size, table, k, width)) is not None:
        return Nearest(*parts[:4]), parts[4]
    return _first_present(points.index, table, k, width, pixels, geometry), None


@lru_cache(maxsize=64)
def _most_tied(size: Size, grid: Size, length: int, convention: CoordinateConvention) -> int:
    """T of the module, for a table of this length."""
    if not convention.shares_ties:
        return 1
    if length > _LONGEST_TABLE:
        return _MOST_TIED
    ends = ordered_pixels(size, grid, length, convention, torch.device("cpu")).ends
    return min(int((ends - torch.arange(length)).max()), _MOST_TIED)


@lru_cache(maxsize=16)
def _columns(
    size: Size, grid: Size, length: int, convention: CoordinateConvention, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ordered_pixels` as int32 (L, Q) twice: nodes next to each other, as a GPU reads them. L may be 0."""
    if length == 0:
        nothing = torch.empty(0, grid[0] * grid[1], dtype=torch.int32, device=device)
        return nothing, nothing
    table = ordered_pixels(size, grid, length, convention, torch.device("cpu"))
    ids, ends = (part.t().int().contiguous().to(device) for part in (table.ids, table.ends))
    return ids, ends


@lru_cache(maxsize=16)
def _nearest_on_full_lattice(
    size: Size, grid: Size, k: int, convention: CoordinateConvention, device: torch.device
) -> Nearest:
    width = int(ordered_pixels(size, grid, k, convention, device).ends[:, -1].max())
    table = ordered_pixels(size, grid, width, convention, device)
    before, counts = table.begins[:, k - 1], table.ends[:, k - 1]
    node, rank = (torch.arange(width, device=device) < counts[:, None]).nonzero(as_tuple=True)
    entries = _Entries(node, rank, table.ids[node, rank], table.squared[node, rank])
    return _assembled(before, counts, k, entries)


def _assembled(before: torch.Tensor, counts: torch.Tensor, k: int, *parts: _Entries) -> Nearest:
    """All entries in their order. before, counts: int64 (B·Q,), of each node those nearer than the K-th, and all."""
    node, rank, ids, squared = (torch.cat(part) for part in zip(*parts))
    ends = F.pad(counts.cumsum(0), (1, 0))
    place = ends.index_select(0, node) + rank
    ids, squared = (torch.empty_like(t).scatter_(0, place, t) for t in (ids, squared))
    share = (k - before) / (counts - before)  # j / J
    first = (ends[:-1] + before).repeat_interleave(counts, output_size=len(ids))  # of those tied
    tied = torch.arange(len(ids), device=ids.device) >= first
    shares = share.repeat_interleave(counts, output_size=len(ids)).where(tied, 1.0)
    return Nearest(ids, squared, shares, ends)


def _first_present(
    index: torch.Tensor, table: PixelTable, k: int, width: int, pixels: int, geometry: Geometry
) -> Nearest:
    """What the nodes of all images read of `index` (B, M).

    Most nodes find it in the first columns of the table; the others look through all, or are searched for.
    """
    batch, (nodes, length) = index.shape[0], table.ids.shape
    present = torch.zeros(batch, pixels, dtype=torch.uint8, device=index.device).scatter_(1, index, 1)
    first = table.ids[:, : max(length * 3 // 8, k)]
    there = present.index_select(1, first.flatten()).view(-1, first.shape[1])
    node = torch.arange(batch * nodes, device=index.device)
    before, counts, entries, missing = _take(there, node, table, k, width)
    parts = [entries]
    if len(missing):
        ids = table.ids.index_select(0, missing % nodes) + (missing // nodes * pixels)[:, None]
        there = present.flatten().index_select(0, ids.flatten()).view(-1, length)
        before[missing], counts[missing], entries, starved = _take(there, missing, table, k, width)
        parts.append(entries)
        if len(starved):
            before[starved], counts[starved], entries = search(starved, index, k, width, geometry)
            parts.append(entries)
    return _assembled(before, counts, k, *parts)


def _take(
    there: torch.Tensor, node: torch.Tensor, table: PixelTable, k: int, width: int
) -> tuple[torch.Tensor, torch.Tensor, _Entries, torch.Tensor]:
    """What nodes (N,) read, given which pixels of the first columns of their rows are present, uint8 (N, l).

    Returns `before` and `counts` of `_assembled` (N,), the entries, and those of the nodes for which these columns do
    not tell, which have no entries.
    """
    columns, row = there.shape[1], node % len(table.ids) * table.ids.shape[1]  # where the row of the table begins
    seen = there.cumsum(1, dtype=torch.int16)  # present pixels up to and including each column
    last = torch.searchsorted(seen, seen.new_full((len(seen), 1), k)).squeeze(1)
    at = row + last.clamp(max=columns - 1)
    begins, ends = (part.flatten().index_select(0, at) for part in (table.begins, table.ends))
    known = (last < columns) & (ends <= columns)
    ends = ends.where(known, 0)
    before, counts = (F.pad(seen, (1, 0)).gather(1, part[:, None]).squeeze(1).long() for part in (begins, ends))
    taken = there.bool() & (torch.arange(columns, device=node.device) < ends[:, None])
    place = taken.flatten().nonzero().squeeze(1)
    which = place.div(columns, rounding_mode="floor")
    rank = seen.flatten().index_select(0, place).long().sub_(1)
    at = row.index_select(0, which) + (place - which * columns)
    ids, squared = (part.flatten().index_select(0, at) for part in (table.ids, table.squared))
    entries = _Entries(node.index_select(0, which), rank, ids, squared)
    if int(counts.max()) > width:
        entries = _Entries(*(part[rank < width] for part in entries))
    return before, counts.clamp_(max=width), entries, node[~known]


def search(
    node: torch.Tensor, index: torch.Tensor, k: int, width: int, geometry: Geometry
) -> tuple[torch.Tensor, torch.Tensor, _Entries]:
    """Brute force: what nodes (N,), numbered image by image, read of the pixels `index` (B, M); as `_take`."""
    if not geometry.fits_int64:
        raise ValueError(
            f"a {len(geometry.pixel_rows)}x{len(geometry.pixel_cols)} lattice and a {len(geometry.node_rows)}x"
            f"{len(geometry.node_cols)} grid have no common pitch that fits int64; take sides with common factors"
        )
    found = []
    nodes = len(geometry.node_rows) * len(geometry.node_cols)
    for part in node.split(max(_CHUNK // index.shape[1], 1)):
        ids = index[part // nodes]  # (n, M)
        offsets = geometry.offsets((part % nodes)[:, None], ids)
        distance = offsets[0].square() + offsets[1].square()
        farthest = distance.kthvalue(k, dim=1, keepdim=True).values
        near = distance <= farthest
        before, counts = (distance < farthest).sum(1), near.sum(1)
        which, place = near.nonzero(as_tuple=True)
        order = ids[which, place].argsort()
        for key in (distance[which, place], which):
            order = order[key[order].argsort(stable=True)]
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[which]
        order, rank = order[rank < width], rank[rank < width]
        which, place = which[order], place[order]
        squared = geometry.in_unit_square(*(axis[which, place] for axis in offsets))
        found.append((before, counts.clamp_(max=width), part[which], rank, ids[which, place], squared))
    before, counts, *entries = map(torch.cat, zip(*found))
    return before, counts, _Entries(*entries)
