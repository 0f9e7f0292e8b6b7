"""The native depthwise convolution on a CPU: neighbour lists and sums in C (`convolution.c`).

Letters: B batch, C channels, M points, K taps, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from diffusion.coordinates import Points, Size
from models.operators import compiled
from models.operators.opaque import opaque

_CHUNK = 512  # points per partial sum of the weight gradient, at least: few points still occupy several threads
_MOST_CHUNKS = 64  # bounds the memory of the partial sums where there are many points
_MOST_ROWS = 2**31 - 1  # rows are int32


@dataclass(frozen=True, eq=False)
class NeighbourList:
    """The present pixels in the window of each point of B images, or of one image that stands for all.

    ends: int64 (B·M,), running sums of the counts. rows, taps: int32 (E,), rows counted through the batch.
    """

    ends: torch.Tensor
    rows: torch.Tensor
    taps: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Present pixels in the window of each point, int64 (B·M,)."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


def neighbours(points: Points, batch: int, kernel_shape: Size, device: torch.device) -> NeighbourList:
    """The list for the windows of `kernel_shape` pixels around the points; that of a full lattice is kept.

    Raises ValueError for ids that are outside the lattice or repeated, and for more rows than int32 can number.
    """
    if points.index is None:
        return _full_lattice(points.size, kernel_shape)
    if points.index.numel() > _MOST_ROWS:
        raise ValueError(f"points.index holds {points.index.numel()} ids; accepted: at most {_MOST_ROWS} on a CPU")
    return _build(points.index.contiguous(), points.size, kernel_shape)


@lru_cache(maxsize=4)
def _full_lattice(size: Size, kernel_shape: Size) -> NeighbourList:
    return _build(Points(size).ids(), size, kernel_shape)


def _build(index: torch.Tensor, size: Size, kernel_shape: Size) -> NeighbourList:
    batch, points = index.shape
    lattice = (batch, points, *size, *kernel_shape)
    rows_of_pixels = torch.empty(batch, size[0] + kernel_shape[0] - 1, size[1] + kernel_shape[1] - 1, dtype=torch.int32)
    faults = torch.empty(batch, dtype=torch.int32)
    compiled.call("infty_index_map", index, *lattice, rows_of_pixels, faults)
    if bool(faults.any()):
        kind = "repeats a pixel id within one function" if 2 in faults else "holds an id outside the lattice"
        raise ValueError(f"points.index {kind}; accepted: distinct ids from 0 to {size[0] * size[1] - 1}")
    counts = torch.empty(batch * points, dtype=torch.int32)
    compiled.call("infty_count", index, rows_of_pixels, *lattice, counts)
    ends = counts.cumsum(0)  # int64
    rows, taps = (torch.empty(int(ends[-1]), dtype=torch.int32) for _ in range(2))
    compiled.call("infty_fill", index, rows_of_pixels, ends, *lattice, rows, taps)
    return NeighbourList(ends, rows, taps)


def list_bytes(points: Points, batch: int, kernel_shape: Size) -> int:
    """Bytes of the rows and taps of `NeighbourList` that points spread evenly take; borders have fewer."""
    images = 1 if points.index is None else batch
    density = points.count / (points.size[0] * points.size[1])
    return round(8 * images * points.count * kernel_shape[0] * kernel_shape[1] * density)


def depthwise(
    x: torch.Tensor,
    taps: torch.Tensor,
    scale: torch.Tensor,
    neighbours: NeighbourList,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """out(p) = scale(p) · Σ taps(q − p) · x(q), plus residual: (B, M, C) in the dtype of x, computed in float32.

    taps: float32 (K, C). scale: float32 (B or 1, M, 1). Differentiable in x, taps and residual.
    """
    lists = (neighbours.ends, neighbours.rows, neighbours.taps)
    residual = None if residual is None else residual.float()
    return _forward(x.float(), taps, scale, *lists, residual).to(x.dtype)


@opaque("infty_diff::depthwise_cpu")
def _forward(
    x: torch.Tensor,
    kernel: torch.Tensor,
    scale: torch.Tensor,
    ends: torch.Tensor,
    rows: torch.Tensor,
    taps: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    x, kernel = x.contiguous(), kernel.contiguous()
    out = torch.empty_like(x)
    scale, residual = scale.contiguous(), None if residual is None else residual.contiguous()
    sizes = (x.shape[0] * x.shape[1], len(ends), x.shape[2])
    compiled.call("infty_forward", x, kernel, scale, residual, ends, rows, taps, *sizes, out)
    return out


@_forward.register_fake
def _(x, kernel, scale, ends, rows, taps, residual):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@opaque("infty_diff::depthwise_cpu_backward")
def _backward(
    gradient: torch.Tensor,
    scale: torch.Tensor,
    x: torch.Tensor,
    kernel: torch.Tensor,
    ends: torch.Tensor,
    rows: torch.Tensor,
    taps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients with respect to x and kernel."""
    x, kernel = x.contiguous(), kernel.contiguous()
    g = (gradient * scale).contiguous()
    (num_taps, channels), points = kernel.shape, x.shape[0] * x.shape[1]
    chunk = max(_CHUNK, -(-points // _MOST_CHUNKS))
    dx, partial = torch.empty_like(x), kernel.new_zeros(-(-points // chunk), num_taps, channels)
    sizes = (points, len(ends), channels, num_taps, chunk)
    compiled.call("infty_backward", g, x, kernel, ends, rows, taps, *sizes, dx, partial)
    return dx, partial.sum(0)


@_backward.register_fake
def _(gradient, scale, x, kernel, ends, rows, taps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(kernel)


def _setup_context(ctx, inputs, output):
    x, kernel, scale, ends, rows, taps, residual = inputs
    ctx.save_for_backward(x, kernel, scale, ends, rows, taps)
    ctx.has_residual = residual is not None


def _differentiate(ctx, gradient):
    x, kernel, scale, *lists = ctx.saved_tensors
    dx, dkernel = _backward(gradient, scale, x, kernel, *lists)
    return dx, dkernel, None, None, None, None, gradient if ctx.has_residual else None


_forward.register_autograd(_differentiate, _setup_context)
