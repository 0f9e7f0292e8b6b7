"""The enlarged kernel on a full lattice for GPUs, in Triton: see `enlarged` for the equation.

One kernel filters rows along their columns and combines the results by the taps of the k × k kernel, k rows for each of
x; the other filters these along the other axis. Between the two they wait in a ring of the rows that a band of out
needs, so that each is computed once whatever the size of bands.

A row of the lattice is W·C numbers in a line: a shift by a pixel is one by C, and what it takes past an end of the line
is what lies outside the lattice. Programs take a few rows of a piece of the line, so that what they read once, a tap or
a row in between, serves them all. Sums are float32 in a fixed order, hence bit-reproducible. Letters: B batch,
C channels, H × W lattice, N = W·C, k kernel side, U (k, k'_h) and V (k, k'_w) the resampling along the axes.
"""

# mypy: disable-error-code="assignment"
# In the kernels, tuples grow by an element.

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

# Bytes of the ring that hold a band, beside the rows above and below it, unless it is smaller than these.
_RING = 1 << 28
# Rows and numbers of a program of four warps: 64 sums of a thread when spreading, and at k = 7 56 when filtering.
_SPREAD_ROWS, _SPREAD_BLOCK = 8, 1024
_FILTER_ROWS, _FILTER_BLOCK = 4, 256
# What differs from band to band, and must not lead to another compilation.
_ROWS = ("first_row", "rows", "start", "end", "slots", "height")


@triton.jit
def _place(rows, length, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Image, group of rows and places in the line of this program; those beyond the line are for masks."""
    pieces = tl.cdiv(length, BLOCK)
    groups = tl.cdiv(rows, ROWS)
    program = tl.program_id(0) // pieces
    return (program // groups).to(tl.int64), program % groups, tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=_ROWS)
def filter_kernel(
    ring, x, kernel, interpolation, segments, first_row, rows, slots, height, length, channels,
    K: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ_j K[i, j] Σ_s V[j, s] x(y, · + s) for the rows y from first_row on: into slot y % slots.

    Pointers: ring float32 (B, slots, k, N). x: (B, H, N). kernel: float32 (k, k, C). interpolation: float32
    (k, k'_w), V. segments: int32 (k,).
    """
    image, group, lane = _place(rows, length, ROWS, BLOCK)
    start, end = first_row + group * ROWS, first_row + rows
    zero = tl.zeros((BLOCK,), tl.float32)
    taps = kernel + lane % channels
    sums = (zero,) * (K * ROWS)
    here = (zero,) * ROWS
    for j in tl.static_range(K):
        following = (zero,) * ROWS
        if j + 1 < K:
            for s in range(tl.load(segments + j), tl.load(segments + j + 1)):
                near = tl.load(interpolation + j * TAPS + s)
                far = tl.load(interpolation + (j + 1) * TAPS + s)
                place = lane + (s - TAPS // 2) * channels
                inside = (place >= 0) & (place < length)
                new_here, new_following = (), ()
                for r in tl.static_range(ROWS):
                    row = x + (image * height + tl.minimum(start + r, end - 1)) * length
                    value = tl.load(row + place, mask=inside, other=0.0).to(tl.float32)
                    new_here += (tl.fma(value, near, here[r]),)
                    new_following += (tl.fma(value, far, following[r]),)
                here, following = new_here, new_following
        new_sums = ()
        for i in tl.static_range(K):
            tap = tl.load(taps + (i * K + j) * channels)
            for r in tl.static_range(ROWS):
                new_sums += (tl.fma(tap, here[r], sums[i * ROWS + r]),)
        sums = new_sums
        here = following
    for r in tl.static_range(ROWS):
        if start + r < end:
            to = ring + (image * slots + (start + r) % slots) * K * length + lane
            for i in tl.static_range(K):
                tl.store(to + i * length, sums[i * ROWS + r], mask=lane < length)


@triton.jit(do_not_specialize=_ROWS)
def spread_kernel(
    out, ring, interpolation, segments, scale, residual, first_row, rows, start, end, slots, height, length, channels,
    K: tl.constexpr, TAPS: tl.constexpr, SCALED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows start to end of out: Σ_i Σ_t U[i, t] · row t − k'_h // 2 below of the i-th in `ring`, scale, residual.

    Pointers: out (B, rows, N). ring: float32 (B, slots, k, N). interpolation: float32 (k, k'_h + 2·(ROWS − 1)), U
    flanked by zeros. segments: int32 (k,). scale: float32 (H, W). residual: (B, H, N).
    U is flanked by ROWS − 1 columns of zeros: a row of the ring that some rows of the program need is read for all.
    """
    image, group, lane = _place(end - start, length, ROWS, BLOCK)
    top = start + group * ROWS
    above = top - TAPS // 2
    last = tl.minimum(end + TAPS // 2, height)  # rows from here on are outside the lattice, or not in the ring
    exists = lane < length
    stride: tl.constexpr = TAPS + 2 * (ROWS - 1)
    sums = (tl.zeros((BLOCK,), tl.float32),) * ROWS
    for i in tl.static_range(K):
        # Row i of U reaches over two segments; t is the tap that the uppermost row of the program takes.
        low = tl.maximum(tl.load(segments + (i - 1 if i > 0 else 0)), -above)
        high = tl.minimum(tl.load(segments + (i + 1 if i + 1 < K else i)) + ROWS - 1, last - above)
        for t in range(low, high):
            row = ring + ((image * slots + (above + t) % slots) * K + i) * length
            value = tl.load(row + lane, mask=exists, other=0.0)
            new_sums = ()
            for r in tl.static_range(ROWS):
                weight = tl.load(interpolation + i * stride + ROWS - 1 + t - r)
                new_sums += (tl.fma(value, weight, sums[r]),)
            sums = new_sums
    for r in tl.static_range(ROWS):
        row = top + r
        if row < end:
            total = sums[r]
            if SCALED:
                total *= tl.load(scale + row.to(tl.int64) * (length // channels) + lane // channels, mask=exists)
            if RESIDUAL:
                total += tl.load(residual + (image * height + row) * length + lane, mask=exists).to(tl.float32)
            to = out + (image * rows + row - first_row) * length + lane
            tl.store(to, total.to(out.dtype.element_ty), mask=exists)


def enlarged(
    x: torch.Tensor,
    weight: torch.Tensor,
    vertical: tuple[torch.Tensor, torch.Tensor],
    horizontal: tuple[torch.Tensor, torch.Tensor],
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    first_row: int,
    rows: int,
    band: int | None,
) -> torch.Tensor:
    """`enlarged.enlarged` with U and V and their segments, of `enlarged.axis`, for float32, bfloat16 and float16 x.

    The ring holds float32: rounding it to shorter types would triple the error of the result.
    """
    batch, height, width, channels = x.shape
    (u, u_first), (v, v_first) = vertical, horizontal
    (kernel_size, kernel_h), kernel_w, length = u.shape, v.shape[1], width * channels
    u_first, v_first = u_first.int(), v_first.int()
    x, kernel = x.contiguous(), weight.float().permute(1, 2, 0).contiguous()  # (k, k, C)
    reach = kernel_h // 2
    if band is None:
        band = max(_RING // (batch * kernel_size * length * 4), _SPREAD_ROWS, reach)
    band = min(band, rows)
    slots = min(band + 2 * reach, height)
    ring = x.new_empty(batch, slots, kernel_size, length, dtype=torch.float32)
    out = x.new_empty(batch, rows, width, channels)
    padded = F.pad(u, (_SPREAD_ROWS - 1, _SPREAD_ROWS - 1))
    # A pointer is needed, and not read, in place of a scale or residual that is not given.
    scaled, added = (x if tensor is None else tensor.contiguous() for tensor in (scale, residual))
    filtered = max(first_row - reach, 0)
    with torch.cuda.device_of(x):
        for start in range(first_row, first_row + rows, band):
            end = min(start + band, first_row + rows)
            last = min(end + reach, height)
            if last > filtered:
                filter_kernel[_grid(batch, last - filtered, length, _FILTER_ROWS, _FILTER_BLOCK)](
                    ring, x, kernel, v, v_first, filtered, last - filtered, slots, height, length,
                    channels, K=kernel_size, TAPS=kernel_w, ROWS=_FILTER_ROWS, BLOCK=_FILTER_BLOCK,
                )  # fmt: skip
                filtered = last
            spread_kernel[_grid(batch, end - start, length, _SPREAD_ROWS, _SPREAD_BLOCK)](
                out, ring, padded, u_first, scaled, added, first_row, rows, start, end, slots, height, length,
                channels,
                K=kernel_size, TAPS=kernel_h, SCALED=scale is not None, RESIDUAL=residual is not None,
                ROWS=_SPREAD_ROWS, BLOCK=_SPREAD_BLOCK,
            )  # fmt: skip
    return out


def _grid(batch: int, rows: int, length: int, group: int, block: int) -> tuple[int]:
    return (batch * triton.cdiv(rows, group) * triton.cdiv(length, block),)
