"""The depthwise convolution of a full lattice with an enlarged kernel, as a product of low rank, for trained kernels.

At a lattice finer than that of training, kernels k × k are resampled to k'_h × k'_w (`resample_kernel`). Resampling is
done along each axis, K' = Uᵀ K V with U (k, k'_h) and V (k, k'_w), so that

    out(p) = scale(p) · Σ_i Σ_t U[i, t] · Σ_j K[i, j] · Σ_s V[j, s] · x(p + (t, s) − (k'_h // 2, k'_w // 2)), + residual

is k short filters along rows, k² multiplications and k short filters along columns: 2 k'_h + k² + 2 k'_w multiply-adds,
as U and V have two nonzeros per column, in rows next to each other, instead of k'_h·k'_w. The gradient of x is the same
with K turned by 180°, as U and V are symmetric. The lattice is worked off in bands of rows, which bounds what is held
besides x and out. Letters: B batch, C channels, H × W lattice, k kernel size, k'_h × k'_w shape of the enlarged kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from diffusion.coordinates import Size
from models.operators import compiled, dispatch
from models.operators.opaque import opaque
from models.operators.sparse_conv.backend import Span, cell_overlaps, resample_kernel

_BAND = 256  # rows on a CPU: those above and below, which a band computes again, are then few
_TASKS = 4  # of each thread, at least, so that none waits long for the last
_COLUMNS, _BLOCK, _LANES = 16, 8, 16  # of enlarged.c


def pays(kernel_size: int, kernel_shape: Size, span: Span | None = None) -> bool:
    """Whether the product takes fewer multiply-adds than the direct convolution; CPUs then take no longer for it."""
    return (
        _is_product(kernel_size, span)
        and 2 * (kernel_shape[0] + kernel_shape[1]) + kernel_size**2 < kernel_shape[0] * kernel_shape[1]
    )


def _is_product(kernel_size: int, span: Sequence[float] | None) -> bool:
    """Whether columns of U and V have two nonzeros: cells of a coarser lattice overlap more than two of the kernel."""
    return kernel_size > 1 and (span is None or min(span) >= kernel_size)


def enlarged(
    x: torch.Tensor,
    weight: torch.Tensor,
    kernel_shape: Size,
    scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    span: Span | None = None,
    first_row: int = 0,
    rows: int | None = None,
    band: int | None = None,
) -> torch.Tensor:
    """out of the module's equation, with zeros outside the lattice: (B, rows, W, C) in the dtype of x.

    x: (B, H, W, C). weight: (C, k, k), of the training resolution. kernel_shape: (k'_h, k'_w), odd. span: as
    for `resample_kernel`. scale: float32 (H, W) or (H·W,); residual: like x; None for neither. first_row, rows: the
    rows of out to compute, by default all. band: how many at a time, by default what the device does well. Sums are
    taken in float32, for float64 in float64. Differentiable in x and residual where all rows are computed.
    Raises ValueError for other shapes, and where any other gradient is required.
    """
    _, height, width, channels = x.shape
    kernel_size = weight.shape[-1]
    if tuple(weight.shape) != (channels, kernel_size, kernel_size) or kernel_size % 2 == 0:
        raise ValueError(f"weight is of shape {tuple(weight.shape)}; accepted: ({channels}, k, k) with k odd")
    if any(side < 1 or side % 2 == 0 for side in kernel_shape):
        raise ValueError(f"kernel_shape is {tuple(kernel_shape)}; accepted: two odd numbers from 1 on")
    if scale is not None and scale.numel() != height * width:
        raise ValueError(f"scale is of shape {tuple(scale.shape)}; accepted: ({height}, {width})")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual is {residual.dtype} of shape {tuple(residual.shape)}; accepted: the type and shape of x"
        )
    rows = height - first_row if rows is None else rows
    if first_row < 0 or rows < 1 or first_row + rows > height:
        raise ValueError(f"first_row is {first_row} and rows {rows}; accepted: rows of a lattice of {height}")
    if band is not None and band < 1:
        raise ValueError(f"band is {band}; accepted: 1 or more")
    wanted = any(t is not None and t.requires_grad for t in (x, residual))
    if torch.is_grad_enabled() and (weight.requires_grad or (wanted and rows < height)):
        raise ValueError(
            "weight requires a gradient, or x for some rows alone; accepted: gradients of x and residual for all rows"
        )
    scale = None if scale is None else scale.view(height, width)
    return _enlarged(x, weight, kernel_shape, scale, residual, first_row, rows, band, span)


@opaque("infty_diff::enlarged")
def _enlarged(
    x: torch.Tensor,
    weight: torch.Tensor,
    kernel_shape: Sequence[int],
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    first_row: int,
    rows: int,
    band: int | None,
    span: Sequence[float] | None = None,
) -> torch.Tensor:
    kernel_size = weight.shape[-1]
    lattice = (scale, residual, first_row, rows)
    low_rank = _is_product(kernel_size, span) and x.dtype != torch.float64
    triton_enlarged = dispatch.kernels("enlarged convolution", x.device.type)
    if low_rank and triton_enlarged is not None:
        axes = [axis(kernel_size, *lengths, x.device) for lengths in zip(kernel_shape, span or (None, None))]
        return triton_enlarged.enlarged(x, weight, *axes, *lattice, band)
    low_rank = low_rank and x.device.type == "cpu" and compiled.library() is not None
    if low_rank and x.dtype == torch.float32:
        return _compiled(x, first_row, rows, weight, kernel_shape, scale, residual, band, span=span)
    convolve = partial(_compiled if low_rank else _direct, weight=weight, kernel_shape=kernel_shape, span=span)
    return _in_bands(convolve, kernel_shape[0] // 2, x, *lattice, band or _BAND)


@_enlarged.register_fake
def _(x, weight, kernel_shape, scale, residual, first_row, rows, band, span=None):
    return x.new_empty(x.shape[0], rows, *x.shape[2:])


def _save(ctx, inputs, output):
    _, weight, ctx.kernel_shape, scale, residual, _, _, ctx.band, ctx.span = inputs
    ctx.save_for_backward(weight, scale)
    ctx.has_residual = residual is not None


def _gradients(ctx, gradient):
    weight, scale = ctx.saved_tensors
    scaled = gradient if scale is None else gradient * scale.unsqueeze(2).to(gradient.dtype)
    dx = _enlarged(scaled, weight.flip(1, 2), ctx.kernel_shape, None, None, 0, gradient.shape[1], ctx.band, ctx.span)
    return dx, None, None, None, gradient if ctx.has_residual else None, None, None, None, None


_enlarged.register_autograd(_gradients, _save)


@lru_cache(maxsize=64)
def axis(kernel_size: int, taps: int, span: float | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """U of the module, what `resample_kernel` does along one axis, float32 (k, k'), and its segments, int64 (k,).

    Columns first[i] to first[i + 1] of U are zero but in the rows i and i + 1; the last of `first` is k'.
    """
    if span is None:
        identity = torch.eye(kernel_size, dtype=torch.float64)
        weights = F.interpolate(identity[None], size=taps, mode="linear", align_corners=False)[0]
        # Column t lies at (t + 1/2)·k/k' − 1/2 between the rows, which is at least i from (k'·(2i + 1) − k) / 2k on.
        inner = [-((kernel_size - taps * (2 * i + 1)) // (2 * kernel_size)) for i in range(1, kernel_size - 1)]
    else:
        weights = cell_overlaps(kernel_size, taps, span, device)
        # Cell t begins at t − k'/2, cell i of the kernel at i·s/k − s/2.
        inner = [math.ceil(i * span / kernel_size + (taps - span) / 2) for i in range(1, kernel_size - 1)]
    return weights.float().to(device), torch.tensor([0, *inner, taps], device=device)


def _compiled(
    x: torch.Tensor,
    first_row: int,
    rows: int,
    weight: torch.Tensor,
    kernel_shape: Sequence[int],
    scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    band: int | None = None,
    span: Sequence[float] | None = None,
) -> torch.Tensor:
    """In C (`enlarged.c`), for float32."""
    (batch, height, width, channels), kernel_size = x.shape, weight.shape[-1]
    x, weight = x.contiguous(), weight.float().contiguous()
    scale, residual = (None if tensor is None else tensor.contiguous() for tensor in (scale, residual))
    axes: list[torch.Tensor | int] = []
    for side, covered in zip(kernel_shape, span or (None, None)):
        weights, first = axis(kernel_size, side, covered, x.device)
        axes += [side, first, weights]
    threads, columns = torch.get_num_threads(), -(-width // _COLUMNS)
    # Bands compute the rows around them again: no more than the threads need, and each higher than its surroundings.
    bands = min(-(-_TASKS * threads // (batch * columns)), rows // (2 * kernel_shape[0]))
    band = min(band or -(-rows // max(bands, 1)), rows)
    slices = -(-channels // _LANES)
    held = (kernel_shape[0] + _BLOCK - 1) * _COLUMNS + kernel_size**2  # of a slice
    blocks = (2 * kernel_size + 1) * _COLUMNS + kernel_shape[1] - 1 + slices * held
    work = torch.empty(threads, blocks * _LANES, dtype=torch.float32)
    out = x.new_empty(batch, rows, width, channels)
    sizes = (batch, height, width, channels, kernel_size, first_row, rows, band)
    compiled.call("infty_enlarged", x, weight, scale, residual, out, *sizes, *axes, threads, work, work.shape[1])
    return out


def _direct(
    x: torch.Tensor,
    first_row: int,
    rows: int,
    weight: torch.Tensor,
    kernel_shape: Sequence[int],
    span: Sequence[float] | None,
) -> torch.Tensor:
    """`conv2d` with the resampled kernel: in PyTorch the product of low rank is slower, its parts leave the caches."""
    kernel = resample_kernel(weight.to(x.dtype).unsqueeze(1), kernel_shape, span)  # (C, 1, k'_h, k'_w)
    padding = (kernel_shape[0] // 2, kernel_shape[1] // 2)
    out = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=padding, groups=len(weight))
    return out.permute(0, 2, 3, 1)[:, first_row : first_row + rows]


def _in_bands(
    convolve: Callable[[torch.Tensor, int, int], torch.Tensor],
    reach: int,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    first_row: int,
    rows: int,
    band: int,
) -> torch.Tensor:
    """Rows of `convolve`, given x within their `reach` in float32 at least, band by band; then scale and residual."""
    out = x.new_empty(x.shape[0], rows, *x.shape[2:])
    for start in range(first_row, first_row + rows, band):
        end = min(start + band, first_row + rows)
        low, high = max(start - reach, 0), min(end + reach, x.shape[1])
        slab = x[:, low:high].to(torch.promote_types(x.dtype, torch.float32))
        values = convolve(slab, start - low, end - start)
        if scale is not None:
            values = values * scale[start:end, :, None]
        if residual is not None:
            values = values + residual[:, start:end]
        out[:, start - first_row : end - first_row] = values
    return out
