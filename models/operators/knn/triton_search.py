"""Exact nearest present pixels of every grid node on a GPU, in Triton: the look-up of `search` without the host.

A program walks the tables of a block of nodes of one image until each has K present pixels and those tied with the
last. A node whose table runs out is searched for among all points of its image by the same program, by the same order:
(distance, pixel id) in exact integers. So nothing is read back from the device. Letters: B batch, M points, Q nodes,
K nearest points, W width of the gather, L length of the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from models.operators.opaque import opaque

_NODES = 32  # of a program, one per lane of its only warp: a block waits for its slowest node
_STEPS = 4  # entries of the table between two looks at whether the block is done
_POINTS = 64  # taken at a time when a node is searched for
_BEYOND = tl.constexpr(2**63 - 1)  # no distance, and no pixel id, is as large


@triton.jit
def _before(distance, pixel, other_distance, other_pixel):
    """The order of pixels seen from a node."""
    return (distance < other_distance) | ((distance == other_distance) & (pixel < other_pixel))


@triton.jit
def _offsets(pixel, row, col, pixel_rows, pixel_cols, width):
    """Row and column differences between pixels and nodes at (row, col). pixel_rows: (H,). pixel_cols: (W,)."""
    pixel = pixel.to(tl.int32)  # divisions of 64 bits take several times as long
    return tl.load(pixel_rows + pixel // width) - row, tl.load(pixel_cols + pixel % width) - col


@triton.jit
def _search(index, points, row, col, last_distance, last_pixel, pixel_rows, pixel_cols, width, POINTS: tl.constexpr):
    """The first pixel of index (M,) after (last_distance, last_pixel) around (row, col): distance, id, place."""
    best = tl.full((POINTS,), _BEYOND, tl.int64)  # by lane
    best_pixel = best
    best_place = tl.zeros((POINTS,), tl.int64)
    for start in range(0, points, POINTS):
        place = start + tl.arange(0, POINTS)
        exists = place < points
        pixel = tl.load(index + place, mask=exists, other=0)
        rows, cols = _offsets(pixel, row, col, pixel_rows, pixel_cols, width)
        distance = rows * rows + cols * cols
        after = exists & _before(last_distance, last_pixel, distance, pixel)
        better = after & _before(distance, pixel, best, best_pixel)
        best = tl.where(better, distance, best)
        best_pixel = tl.where(better, pixel, best_pixel)
        best_place = tl.where(better, place.to(tl.int64), best_place)
    nearest = tl.min(best, 0)
    first = tl.min(tl.where(best == nearest, best_pixel, _BEYOND), 0)
    return nearest, first, tl.min(tl.where((best == nearest) & (best_pixel == first), best_place, _BEYOND), 0)


@triton.jit
def nearest_kernel(
    pixels, places, squared, shares, index, present, table, ends, pixel_rows, pixel_cols, node_rows, node_cols,
    points, nodes, length, lattice, width, grid_width, denominator,
    K: tl.constexpr, WIDTH: tl.constexpr, NODES: tl.constexpr, STEPS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """The outputs of `nearest_present`.

    Pointers: pixels, places int64 and squared, shares float32 (B, Q, W). index: int64 (B, M). present: int32 (B, H·W),
    places of pixels in index, or −1. table, ends: int32 (L, Q). pixel_rows, pixel_cols, node_rows, node_cols: int64
    (H,), (W,) of the lattice, and (U_h,), (U_w,) of the grid.
    """
    blocks = tl.cdiv(nodes, NODES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, NODES)
    node = tl.program_id(0) % blocks * NODES + lane
    exists = node < nodes
    index += image * points
    present += image * lattice
    to = (image * nodes + node) * WIDTH
    found = tl.zeros((NODES,), tl.int32)
    entry = node
    column = tl.zeros((NODES,), tl.int32)
    end = tl.where(exists, length, 0)  # of what the node takes
    wanted = column < end
    while tl.max(wanted.to(tl.int32), 0) > 0:
        for _ in tl.static_range(STEPS):
            candidate = tl.load(table + entry, mask=wanted, other=0).to(tl.int64)
            there = tl.load(present + candidate, mask=wanted, other=-1).to(tl.int64)
            hit = there >= 0
            tl.store(pixels + to + found, candidate, mask=hit)
            tl.store(places + to + found, there, mask=hit)
            last = hit & (found == K - 1)
            end = tl.where(last, tl.load(ends + entry, mask=last, other=0), end)
            found += hit.to(tl.int32)
            entry += nodes
            column += 1
            wanted = (column < tl.minimum(end, length)) & (found < WIDTH)
    row = tl.load(node_rows + node // grid_width, mask=exists, other=0)
    col = tl.load(node_cols + node % grid_width, mask=exists, other=0)
    starved = exists & ((found < K) | ((end > length) & (found < WIDTH)))
    if tl.max(starved.to(tl.int32), 0) > 0:
        for i in range(0, NODES):
            this = lane == i
            if tl.max((this & starved).to(tl.int32), 0) > 0:
                here, across = tl.sum(tl.where(this, row, 0), 0), tl.sum(tl.where(this, col, 0), 0)
                distance, first = tl.full((), -1, tl.int64), tl.full((), -1, tl.int64)
                farthest = distance
                number = tl.full((), 0, tl.int32)
                going = number < 1
                while going:
                    distance, first, at = _search(
                        index, points, here, across, distance, first, pixel_rows, pixel_cols, width, POINTS
                    )
                    farthest = tl.where(number < K, distance, farthest)
                    going = distance == farthest
                    tl.store(pixels + to + number, tl.where(this, first, 0), mask=this & going)
                    tl.store(places + to + number, tl.where(this, at, 0), mask=this & going)
                    number += going.to(tl.int32)
                    going = going & (number < WIDTH)
                found = tl.where(this, number, found)
    tl.debug_barrier()  # what follows reads what was stored
    first = tl.load(pixels + to, mask=exists, other=0)
    place = tl.load(places + to, mask=exists, other=0)
    rows, cols = _offsets(tl.load(pixels + to + K - 1, mask=exists, other=0), row, col, pixel_rows, pixel_cols, width)
    farthest = rows * rows + cols * cols
    room = tl.zeros((NODES,), tl.int32)
    tied = room
    for k in range(0, WIDTH):
        taken = exists & (k < found)
        rows, cols = _offsets(tl.load(pixels + to + k, mask=taken, other=0), row, col, pixel_rows, pixel_cols, width)
        at_farthest = (taken & (rows * rows + cols * cols == farthest)).to(tl.int32)
        tied += at_farthest
        room += tl.where(k < K, at_farthest, 0)
    share = tl.div_rn(room.to(tl.float32), tl.maximum(tied, 1).to(tl.float32))
    for k in range(0, WIDTH):
        taken = exists & (k < found)
        pixel = tl.where(taken, tl.load(pixels + to + k, mask=taken, other=0), first)
        rows, cols = _offsets(pixel, row, col, pixel_rows, pixel_cols, width)
        counts_with = tl.where(rows * rows + cols * cols == farthest, share, 1.0)
        y, x = tl.div_rn(rows.to(tl.float32), denominator), tl.div_rn(cols.to(tl.float32), denominator)
        tl.store(pixels + to + k, pixel, mask=exists)
        tl.store(places + to + k, place, mask=exists & (k >= found))
        tl.store(squared + to + k, y * y + x * x, mask=exists)
        tl.store(shares + to + k, tl.where(taken, counts_with, 0.0), mask=exists)


@opaque("infty_diff::nearest_present")
def nearest_present(
    index: torch.Tensor,
    table: torch.Tensor,
    ends: torch.Tensor,
    axes: Sequence[torch.Tensor],
    denominator: int,
    k: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What every node takes of the pixels `index` (B, M), at most W of them, for K ≤ W ≤ M and H·W < 2³¹.

    table, ends: int32 (L, Q), `pixel_order.PixelTable` transposed; L may be 0. axes: int64 positions of pixel rows
    (H,), pixel columns (W,), node rows and node columns over the common `denominator`.
    Returns pixel ids and places in the list of points, int64 (B, Q, W), and squared distances and shares, float32
    (B, Q, W).
    """
    (batch, points), (length, nodes) = index.shape, table.shape
    (height, columns), grid_width = map(len, axes[:2]), len(axes[3])
    index = index.contiguous()
    order = torch.arange(points, dtype=torch.int32, device=index.device).expand(batch, -1)
    present = torch.full((batch, height * columns), -1, dtype=torch.int32, device=index.device)
    present.scatter_(1, index, order)
    found = _outputs(index, table, ends, axes, denominator, k, width)
    with torch.cuda.device_of(index):
        nearest_kernel[(batch * triton.cdiv(nodes, _NODES),)](
            *found, index, present, table, ends, *axes,
            points, nodes, length, height * columns, columns, grid_width, float(denominator),
            K=k, WIDTH=width, NODES=_NODES, STEPS=_STEPS, POINTS=_POINTS, num_warps=1,
        )  # fmt: skip
    return found


@nearest_present.register_fake
def _outputs(index, table, ends, axes, denominator, k, width):
    shape = (index.shape[0], table.shape[1], width)
    numbers = (torch.int64, torch.int64, torch.float32, torch.float32)
    return tuple(index.new_empty(shape, dtype=dtype) for dtype in numbers)
