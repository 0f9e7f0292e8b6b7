"""The depthwise convolution on points for GPUs, in Triton (`triton_conv_kernels`).

At a present pixel p of a lattice, with P the present pixels and W the k'_h × k'_w window around p,

    out(p) = scale(p) · Σ_{q ∈ P ∩ W} taps[q − p] · x(q) (+ residual(p)).

The transpose, which carries gradients to x, is the same sum with the taps reversed and the scales of q inside. Letters:
B batch, C channels, M points, H × W lattice, k'_h × k'_w kernel, K = k'_h·k'_w taps.

The operators are opaque to `torch.compile`. No shape depends on data and nothing is read back from the device, so that
a step can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from diffusion.coordinates import Points, Size
from models.operators.opaque import opaque
from models.operators.sparse_conv.triton_conv_kernels import gather_kernel, lattice_kernel, list_kernel, taps_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Sums (points × channels) and warps of a program, which fix its registers. By the list a thread holds 8 sums, one
# 16-byte load of a row in half precision; fewer points wait less for the one among them with most neighbours, and two
# warps still fill an H100 at its 32 programs per multiprocessor. On a lattice a thread holds 32, so that taps and
# control are paid once per four rows, and 8 × 8 tiles re-read few rows.
_LIST_BLOCK = (512, 2)
_LATTICE_BLOCK = (4096, 4)
_TILE_H = 8
# The gradient of taps holds the sums of so many taps together, 8 registers of a thread each. One warp, because rows
# then pass between its threads without a barrier.
_TAPS = 8
_TAPS_BLOCK = (256, 1)
# It is split into at least half as many programs, a few waves of them on any GPU, by chunks of points: fixed by the
# shapes, so that the order of summation is. Their partial sums take some 35 MB.
_PROGRAMS, _MIN_CHUNK = 2**14, 64


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Which points lie in the window of each; None throughout on a full lattice, where that is arithmetic.

    entries: (B, min(K, M), M) of int32, or int64 if those are too short: row · 2^⌈log₂ K⌉ + tap of the i-th present
        pixel of the window, i below the count of the point, unset beyond. The worst case has to be allocated anyway,
        so that there are no row pointers to build; and the i-th entries of consecutive points are one load.
    counts: int32 (B, M) number of present pixels in the window.
    present: int32 (B, H + k'_h − 1, W + k'_w − 1), the row of each pixel in x, −1 if absent or in the margin.
    corners: int32 (B, M) position of the first pixel of the window in `present`.
    """

    size: Size
    kernel_shape: Size
    entries: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    present: torch.Tensor | None = None
    corners: torch.Tensor | None = None


def neighbours(points: Points, batch: int, kernel_shape: Size, device: torch.device) -> Neighbours:
    """Neighbours of every point in its window of `kernel_shape` pixels; for a full lattice the same for every image.

    Raises ValueError for even kernels, and for lattices too large to count pixels in 32 bits.
    """
    (height, width), (kernel_h, kernel_w) = points.size, kernel_shape
    if kernel_h % 2 == 0 or kernel_w % 2 == 0:
        raise ValueError(f"kernel_shape is {tuple(kernel_shape)}; accepted: two odd numbers")
    if (height + kernel_h - 1) * (width + kernel_w - 1) >= 2**31:
        raise ValueError(f"points.size is {tuple(points.size)}; accepted: fewer than 2^31 pixels with margins")
    if points.index is None:
        return Neighbours(points.size, kernel_shape)
    if points.index.shape[0] != batch:
        raise ValueError(f"points.index holds {points.index.shape[0]} images; accepted: {batch}, those of the batch")
    return Neighbours(points.size, kernel_shape, *_list(points.index.to(device), points.size, kernel_shape))


def list_bytes(points: Points, batch: int, kernel_shape: Size) -> int:
    """Most bytes of `Neighbours.entries` for so many points; none on a full lattice."""
    if points.index is None:
        return 0
    taps = kernel_shape[0] * kernel_shape[1]
    return batch * points.count * min(taps, points.count) * _entry_format(points.count, taps)[1].itemsize


def depthwise(
    x: torch.Tensor,
    taps: torch.Tensor,
    scale: torch.Tensor,
    neighbours: Neighbours,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """out of the module's equation: (B, M, C) in the type of x, summed in float32.

    x: (B, M, C) float32, bfloat16 or float16. taps: float32 (K, C), offset (i − k'_h//2, j − k'_w//2) at i·k'_w + j.
    scale: float32 (B, M, 1), or (1, M, 1) for all images. residual: as x, in any of these types. Differentiable in x,
    taps and residual; gradients are the same to the last bit on every run. Raises ValueError for other shapes, types.
    """
    kernel_h, kernel_w = neighbours.kernel_shape
    rows = neighbours.size[0] * neighbours.size[1] if neighbours.counts is None else neighbours.counts.shape[1]
    images = x.shape[0] if neighbours.counts is None else neighbours.counts.shape[0]
    if x.dtype not in DTYPES or x.ndim != 3 or tuple(x.shape[:2]) != (images, rows):
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}; accepted: float32, bfloat16 or float16 ({images}, {rows}, C)"
        )
    if taps.dtype != torch.float32 or tuple(taps.shape) != (kernel_h * kernel_w, x.shape[2]):
        raise ValueError(
            f"taps is {taps.dtype} of shape {tuple(taps.shape)}; accepted: float32 {kernel_h * kernel_w, x.shape[2]}"
        )
    if scale.dtype != torch.float32 or scale.shape[0] not in (1, images) or tuple(scale.shape[1:]) != (rows, 1):
        raise ValueError(
            f"scale is {scale.dtype} of shape {tuple(scale.shape)}; accepted: float32 ({images} or 1, {rows}, 1)"
        )
    if residual is not None and (residual.dtype not in DTYPES or residual.shape != x.shape):
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}; "
            f"accepted: float32, bfloat16 or float16 {tuple(x.shape)}"
        )
    n = neighbours
    return _gather(x, taps, scale, residual, n.entries, n.counts, n.present, n.corners, n.size, n.kernel_shape, False)


def _entry_format(points: int, taps: int) -> tuple[int, torch.dtype]:
    """Bits of an entry that hold the tap, and the type that has room for the rows above them."""
    bits = (int(taps) - 1).bit_length()
    return bits, torch.int32 if points * 2**bits <= 2**31 else torch.int64


def _scale_stride(scale: torch.Tensor, points: int) -> int:
    return points if scale.shape[0] > 1 else 0


def _block_c(channels: int) -> int:
    """Channels of a program: a divisor, which spares the masks, if it still fills a load of 16 bytes."""
    divisor = channels & -channels
    return min(divisor if divisor >= 8 else triton.next_power_of_2(channels), 64)


@opaque("infty_diff::neighbour_list")
def _list(
    index: torch.Tensor, size: Sequence[int], kernel_shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tensors of `Neighbours`."""
    (batch, points), (kernel_h, kernel_w) = index.shape, kernel_shape
    entries, counts, present, corners = _list_shapes(index, size, kernel_shape)
    stride = size[1] + kernel_w - 1
    corners.copy_(index + index.div(size[1], rounding_mode="floor") * (kernel_w - 1))
    rows = torch.arange(points, dtype=torch.int32, device=index.device).expand(batch, -1)
    centre = kernel_h // 2 * stride + kernel_w // 2
    present.fill_(-1).flatten(1).scatter_(1, corners.long() + centre, rows)
    if index.numel():
        bits, block = _entry_format(points, kernel_h * kernel_w)[0], 128
        with torch.cuda.device_of(index):
            list_kernel[(batch * triton.cdiv(points, block),)](
                entries, counts, present, corners, points, entries.shape[1], present[0].numel(), stride,
                kernel_h, kernel_w, BITS=bits, BLOCK_P=block,
            )  # fmt: skip
    return entries, counts, present, corners


@_list.register_fake
def _list_shapes(
    index: torch.Tensor, size: Sequence[int], kernel_shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, points), (kernel_h, kernel_w) = index.shape, kernel_shape
    taps = kernel_h * kernel_w
    entries = index.new_empty(batch, min(taps, points), points, dtype=_entry_format(points, taps)[1])
    counts = index.new_empty(batch, points, dtype=torch.int32)
    present = index.new_empty(batch, size[0] + kernel_h - 1, size[1] + kernel_w - 1, dtype=torch.int32)
    return entries, counts, present, torch.empty_like(counts)


@opaque("infty_diff::depthwise_gather")
def _gather(
    x: torch.Tensor,
    taps: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor | None,
    entries: torch.Tensor | None,
    counts: torch.Tensor | None,
    present: torch.Tensor | None,
    corners: torch.Tensor | None,
    size: Sequence[int],
    kernel_shape: Sequence[int],
    transposed: bool,
) -> torch.Tensor:
    """The convolution or its transpose. `present` and `corners` are for the gradient of taps only."""
    batch, points, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x, taps, scale = x.contiguous(), taps.contiguous(), scale.contiguous()
    added = x if residual is None else residual.contiguous()  # a pointer is needed, and not read without a residual
    stride, block_c = _scale_stride(scale, points), _block_c(channels)
    flags = {"C": channels, "TRANSPOSED": transposed, "RESIDUAL": residual is not None, "BLOCK_C": block_c}
    with torch.cuda.device_of(x):
        if counts is None:
            sums, warps = _LATTICE_BLOCK
            tile_w = sums // block_c // _TILE_H
            tiles = triton.cdiv(size[0], _TILE_H) * triton.cdiv(size[1], tile_w)
            lattice_kernel[(batch * tiles, triton.cdiv(channels, block_c))](
                out, x, taps, scale, added, *size, *kernel_shape, stride,
                TILE_H=_TILE_H, TILE_W=tile_w, num_warps=warps, **flags,
            )  # fmt: skip
        else:
            assert entries is not None
            sums, warps = _LIST_BLOCK
            block_p, bits = sums // block_c, _entry_format(points, len(taps))[0]
            gather_kernel[(batch * triton.cdiv(points, block_p), triton.cdiv(channels, block_c))](
                out, x, taps, scale, added, entries, counts, points, entries.shape[1], len(taps) - 1, stride,
                BITS=bits, BLOCK_P=block_p, num_warps=warps, **flags,
            )  # fmt: skip
    return out


@_gather.register_fake
def _(x, taps, scale, residual, entries, counts, present, corners, size, kernel_shape, transposed):
    return x.new_empty(x.shape)


@opaque("infty_diff::depthwise_taps_gradient")
def _taps_gradient(
    x: torch.Tensor,
    grad: torch.Tensor,
    scale: torch.Tensor,
    present: torch.Tensor | None,
    corners: torch.Tensor | None,
    size: Sequence[int],
    kernel_shape: Sequence[int],
) -> torch.Tensor:
    """Σ_p scale(p) · grad(p) · x(p + offset of the tap): float32 (K, C), as fixed partial sums, then their sum."""
    batch, points, channels = x.shape
    taps = kernel_shape[0] * kernel_shape[1]
    if x.numel() == 0:
        return x.new_zeros(taps, channels, dtype=torch.float32)
    x, grad, scale = x.contiguous(), grad.contiguous(), scale.contiguous()
    block_c, (sums, warps) = _block_c(channels), _TAPS_BLOCK
    groups, blocks_c = triton.cdiv(taps, _TAPS), triton.cdiv(channels, block_c)
    chunk = max(_MIN_CHUNK, triton.next_power_of_2(triton.cdiv(batch * points * groups * blocks_c, _PROGRAMS)))
    partials = x.new_empty(batch * triton.cdiv(points, chunk), taps, channels, dtype=torch.float32)
    stride = size[1] + kernel_shape[1] - 1
    full = present is None
    with torch.cuda.device_of(x):
        taps_kernel[(len(partials), groups, blocks_c)](
            partials, x, grad, scale, x if full else present, x if full else corners, points, chunk,
            *size, *kernel_shape, (size[0] + kernel_shape[0] - 1) * stride, stride, _scale_stride(scale, points),
            C=channels, FULL=full, TAPS=_TAPS, BLOCK_P=sums // block_c, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
    return partials.sum(0)


@_taps_gradient.register_fake
def _(x, grad, scale, present, corners, size, kernel_shape):
    return x.new_empty(kernel_shape[0] * kernel_shape[1], x.shape[2], dtype=torch.float32)


def _save(ctx, inputs, output):
    x, taps, scale, residual, entries, counts, present, corners, ctx.size, ctx.kernel_shape, ctx.transposed = inputs
    wants_taps = ctx.needs_input_grad[1]
    ctx.residual_type = None if residual is None else residual.dtype
    ctx.save_for_backward(x if wants_taps else None, taps, scale, entries, counts, present, corners)


def _backward(ctx, grad):
    x, taps, scale, entries, counts, present, corners = ctx.saved_tensors
    grad_x = grad_taps = grad_residual = None
    if ctx.needs_input_grad[0]:
        grad_x = _gather(
            grad, taps, scale, None, entries, counts, present, corners, ctx.size, ctx.kernel_shape, not ctx.transposed
        )
    if ctx.needs_input_grad[1]:
        read, weighted = (grad, x) if ctx.transposed else (x, grad)  # the scale always goes with the gathering side
        grad_taps = _taps_gradient(read, weighted, scale, present, corners, ctx.size, ctx.kernel_shape)
    if ctx.needs_input_grad[3]:
        grad_residual = grad.to(ctx.residual_type)
    return grad_x, grad_taps, None, grad_residual, *[None] * 7


_gather.register_autograd(_backward, _save)
