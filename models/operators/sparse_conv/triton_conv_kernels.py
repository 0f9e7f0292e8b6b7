"""Triton kernels of the depthwise convolution on points; `triton_conv` launches them.

Letters: B batch, C channels, M points, H × W lattice, K = k'_h·k'_w taps. Axis 0 of every grid runs over images and
blocks of their points, so that points close to one another, which share rows, run together. Rows are M or H·W of one
image, counted from its first; everything multiplied by an image or by C is 64 bits wide, which costs nothing: the
multiplication into an address is one instruction. Sums are float32 in a fixed order, hence bit-reproducible.

Pointers: out, x, grad, residual (B, M, C), with M = H·W on a full lattice. taps: float32 (K, C). scale: float32 (B, M),
or (M,) with scale_stride 0. entries: int32 or int64 (B, slots, M). counts, corners: int32 (B, M). present: int32
(B, cells), cells = (H + k'_h − 1)·stride with stride = W + k'_w − 1. partials: float32 (chunks of all images, K, C).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _channels(C: tl.constexpr, BLOCK_C: tl.constexpr, axis: tl.constexpr):
    """The channels of this program and which of them exist, a constant where all do: its masks then vanish."""
    channel = tl.program_id(axis) * BLOCK_C + tl.arange(0, BLOCK_C)
    if C % BLOCK_C == 0:
        return channel, tl.full((BLOCK_C,), True, tl.int1)
    return channel, channel < C


@triton.jit
def _rows(x, row, here, channel, exists, scale, C: tl.constexpr, SCALED: tl.constexpr):
    """float32 rows of x, zero where not `here`, times their own scale if SCALED."""
    mask = here[:, None] & exists[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(scale + row, mask=here, other=0.0)[:, None]
    return values


@triton.jit
def _write(
    out, total, point, valid, channel, exists, scale, residual,
    C: tl.constexpr, TRANSPOSED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Scale the sums, unless their terms were, add the residual, and round once."""
    mask = valid[:, None] & exists[None, :]
    offset = point.to(tl.int64)[:, None] * C + channel[None, :]
    if not TRANSPOSED:
        total *= tl.load(scale + point, mask=valid, other=0.0)[:, None]
    if RESIDUAL:
        total += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def list_kernel(
    entries, counts, present, corners, points, slots, cells, stride, kernel_h, kernel_w,
    BITS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Pack the present pixels of every window, in tap order: entries (B, slots, M) and counts (B, M)."""
    blocks = tl.cdiv(points, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = point < points
    window = present + image * cells + tl.load(corners + image * points + point, mask=valid, other=0)
    entries += image * slots * points
    count = tl.zeros((BLOCK_P,), tl.int32)
    for i in range(0, kernel_h):
        for j in range(0, kernel_w):
            row = tl.load(window + i * stride + j, mask=valid, other=-1)
            here = row >= 0
            entry = (row.to(entries.dtype.element_ty) << BITS) | (i * kernel_w + j)
            tl.store(entries + count.to(tl.int64) * points + point, entry, mask=here)
            count += here.to(tl.int32)
    tl.store(counts + image * points + point, count, mask=valid)


@triton.jit
def gather_kernel(
    out, x, taps, scale, residual, entries, counts, points, slots, last_tap, scale_stride,
    C: tl.constexpr, BITS: tl.constexpr, TRANSPOSED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The convolution by the list, or its transpose: taps reversed, scales taken with the rows read."""
    blocks = tl.cdiv(points, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    point = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel, exists = _channels(C, BLOCK_C, 1)
    valid = point < points
    first = image * points
    x += first * C
    scale += image * scale_stride
    count = tl.load(counts + first + point, mask=valid, other=0)
    slot = entries + image * slots * points + point
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(0, tl.max(count, 0)):
        here = i < count
        entry = tl.load(slot, mask=here, other=0)
        slot += points
        tap = (entry & ((1 << BITS) - 1)).to(tl.int32)
        if TRANSPOSED:
            tap = last_tap - tap
        rows = _rows(x, entry >> BITS, here, channel, exists, scale, C, TRANSPOSED)
        weight = tl.load(taps + tap[:, None] * C + channel[None, :], mask=exists[None, :], other=0.0)
        total = tl.fma(weight, rows, total)
    _write(out + first * C, total, point, valid, channel, exists, scale, residual + first * C, C, TRANSPOSED, RESIDUAL)


@triton.jit
def lattice_kernel(
    out, x, taps, scale, residual, height, width, kernel_h, kernel_w, scale_stride,
    C: tl.constexpr, TRANSPOSED: tl.constexpr, RESIDUAL: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`gather_kernel` on a full lattice, whose neighbours need no list and share each tap: a tile of pixels each."""
    tiles_w = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_w
    image = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    lane = tl.arange(0, TILE_H * TILE_W)
    row = tile // tiles_w * TILE_H + lane // TILE_W
    col = tile % tiles_w * TILE_W + lane % TILE_W
    channel, exists = _channels(C, BLOCK_C, 1)
    first = image * height * width
    x += first * C
    scale += image * scale_stride
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), tl.float32)
    for i in range(0, kernel_h):
        above = row + i - kernel_h // 2
        inside = (above >= 0) & (above < height)
        for j in range(0, kernel_w):
            left = col + j - kernel_w // 2
            here = inside & (left >= 0) & (left < width)
            tap = i * kernel_w + j
            if TRANSPOSED:
                tap = kernel_h * kernel_w - 1 - tap
            weight = tl.load(taps + tap * C + channel, mask=exists, other=0.0)
            rows = _rows(x, above * width + left, here, channel, exists, scale, C, TRANSPOSED)
            total = tl.fma(weight[None, :], rows, total)
    valid = (row < height) & (col < width)
    _write(
        out + first * C, total, row * width + col, valid, channel, exists, scale, residual + first * C,
        C, TRANSPOSED, RESIDUAL,
    )  # fmt: skip


@triton.jit
def taps_kernel(
    partials, x, grad, scale, present, corners, points, chunk, height, width, kernel_h, kernel_w, cells, stride,
    scale_stride, C: tl.constexpr, FULL: tl.constexpr, TAPS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of some taps from one chunk of points of one image: partials (chunks, K, C).

    Every (tap, lane) keeps its own sums until the chunk ends: reducing over lanes at every step would cost more than
    the products, and the rows of `grad` are read once for all taps of the program.
    """
    chunks = tl.cdiv(points, chunk)
    image = (tl.program_id(0) // chunks).to(tl.int64)
    start = tl.program_id(0) % chunks * chunk
    tap = tl.program_id(1) * TAPS + tl.arange(0, TAPS)
    i, j = tap // kernel_w, tap % kernel_w
    known = tap < kernel_h * kernel_w
    channel, exists = _channels(C, BLOCK_C, 2)
    first = image * points
    x += first * C
    grad += first * C
    scale += image * scale_stride
    total = tl.zeros((TAPS, BLOCK_P, BLOCK_C), tl.float32)
    end = tl.minimum(start + chunk, points)
    for begin in range(start, end, BLOCK_P):
        point = begin + tl.arange(0, BLOCK_P)
        valid = point < end
        if FULL:
            above = (point // width)[None, :] + (i - kernel_h // 2)[:, None]
            left = (point % width)[None, :] + (j - kernel_w // 2)[:, None]
            inside = (above >= 0) & (above < height) & (left >= 0) & (left < width)
            here = inside & valid[None, :] & known[:, None]
            row = above * width + left
        else:
            corner = tl.load(corners + first + point, mask=valid, other=0)
            window = present + image * cells + corner[None, :] + (i * stride + j)[:, None]
            row = tl.load(window, mask=valid[None, :] & known[:, None], other=-1)
            here = row >= 0
        mask = here[:, :, None] & exists[None, None, :]
        offset = row.to(tl.int64)[:, :, None] * C + channel[None, None, :]
        weighted = _rows(grad, point, valid, channel, exists, scale, C, True)[None, :, :]
        values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)  # (TAPS, BLOCK_P, BLOCK_C)
        total = tl.fma(values, weighted, total)
    offset = (tl.program_id(0).to(tl.int64) * kernel_h * kernel_w + tap)[:, None] * C + channel[None, :]
    tl.store(partials + offset, tl.sum(total, 1), mask=known[:, None] & exists[None, :])
