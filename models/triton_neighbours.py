"""Exact nearest present pixels of every grid node on a GPU, in Triton: the look-up of `neighbours` without the host.

A program walks the tables of a block of nodes of one image until each has K present pixels. A node whose table runs out
is searched for among all points of its image by the same program, by the same order: (distance, pixel id) in exact
integers. So nothing is read back from the device. Letters: B batch, M points, Q nodes, K neighbours, L length of the
table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

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
    """Row and column differences between pixels and nodes at (row, col)."""
    pixel = pixel.to(tl.int32)  # divisions of 64 bits take several times as long
    return tl.load(pixel_rows + pixel // width) - row, tl.load(pixel_cols + pixel % width) - col


@triton.jit
def _search(index, points, row, col, last_distance, last_pixel, pixel_rows, pixel_cols, width, POINTS: tl.constexpr):
    """The first pixel of index after (last_distance, last_pixel) around (row, col): distance, id, place in index."""
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
    pixels, places, squared, index, present, table, pixel_rows, pixel_cols, node_rows, node_cols,
    points, nodes, length, lattice, width, grid_width, denominator,
    K: tl.constexpr, NODES: tl.constexpr, STEPS: tl.constexpr, POINTS: tl.constexpr,
):  # fmt: skip
    """(B, Q, K) pixels, places and squared distances. present: (B, H·W), places of pixels in index (B, M), else −1."""
    blocks = tl.cdiv(nodes, NODES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.arange(0, NODES)
    node = tl.program_id(0) % blocks * NODES + lane
    exists = node < nodes
    index += image * points
    present += image * lattice
    found = tl.where(exists, 0, K)
    pixel = (tl.zeros((NODES,), tl.int64),) * K
    place = pixel
    entry = table + node
    column = tl.zeros((NODES,), tl.int32)
    wanted = exists & (column < length)
    while tl.max(wanted.to(tl.int32), 0) > 0:
        for _ in tl.static_range(STEPS):
            candidate = tl.load(entry, mask=wanted, other=0).to(tl.int64)
            there = tl.load(present + candidate, mask=wanted, other=-1).to(tl.int64)
            new_pixel, new_place = (), ()
            for k in tl.static_range(K):
                hit = (there >= 0) & (found == k)
                new_pixel += (tl.where(hit, candidate, pixel[k]),)
                new_place += (tl.where(hit, there, place[k]),)
            pixel, place = new_pixel, new_place
            found += (there >= 0).to(tl.int32)
            entry += nodes
            column += 1
            wanted = (found < K) & (column < length)
    row = tl.load(node_rows + node // grid_width, mask=exists, other=0)
    col = tl.load(node_cols + node % grid_width, mask=exists, other=0)
    if tl.min(found, 0) < K:
        for i in range(0, NODES):
            this = lane == i
            if tl.min(tl.where(this, found, K), 0) < K:
                here, across = tl.sum(tl.where(this, row, 0), 0), tl.sum(tl.where(this, col, 0), 0)
                distance, first = tl.full((), -1, tl.int64), tl.full((), -1, tl.int64)
                new_pixel, new_place = (), ()
                for k in tl.static_range(K):
                    distance, first, at = _search(
                        index, points, here, across, distance, first, pixel_rows, pixel_cols, width, POINTS
                    )
                    new_pixel += (tl.where(this, first, pixel[k]),)
                    new_place += (tl.where(this, at, place[k]),)
                pixel, place = new_pixel, new_place
    for k in tl.static_range(K):
        rows, cols = _offsets(pixel[k], row, col, pixel_rows, pixel_cols, width)
        rows, cols = tl.div_rn(rows.to(tl.float32), denominator), tl.div_rn(cols.to(tl.float32), denominator)
        to = (image * nodes + node) * K + k
        tl.store(pixels + to, pixel[k], mask=exists)
        tl.store(places + to, place[k], mask=exists)
        tl.store(squared + to, rows * rows + cols * cols, mask=exists)


@torch.library.custom_op("infty_diff::nearest_present", mutates_args=())
def nearest_present(
    index: torch.Tensor,
    table: torch.Tensor,
    axes: Sequence[torch.Tensor],
    denominator: int,
    neighbours: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The K nearest of the pixels `index` (B, M) to every node by (distance, id), for K ≤ M and H·W < 2³¹.

    table: int32 (L, Q), the nearest pixels of every node, present or not, in this order; L may be 0. axes: int64
    positions of pixel rows (H,), pixel columns (W,), node rows and node columns over the common `denominator`.
    Returns pixel ids and places in the list of points, int64 (B, Q, K), and squared distances, float32 (B, Q, K).
    """
    (batch, points), (length, nodes) = index.shape, table.shape
    (height, width), grid_width = map(len, axes[:2]), len(axes[3])
    index = index.contiguous()
    order = torch.arange(points, dtype=torch.int32, device=index.device).expand(batch, -1)
    present = torch.full((batch, height * width), -1, dtype=torch.int32, device=index.device).scatter_(1, index, order)
    pixels, places, squared = _outputs(index, table, axes, denominator, neighbours)
    with torch.cuda.device_of(index):
        nearest_kernel[(batch * triton.cdiv(nodes, _NODES),)](
            pixels, places, squared, index, present, table, *axes,
            points, nodes, length, height * width, width, grid_width, float(denominator),
            K=neighbours, NODES=_NODES, STEPS=_STEPS, POINTS=_POINTS, num_warps=1,
        )  # fmt: skip
    return pixels, places, squared


@nearest_present.register_fake
def _outputs(index, table, axes, denominator, neighbours):
    shape = (index.shape[0], table.shape[1], neighbours)
    return index.new_empty(shape), index.new_empty(shape), index.new_empty(shape, dtype=torch.float32)
