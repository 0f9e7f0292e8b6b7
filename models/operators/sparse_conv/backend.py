"""The sparse convolution every back end computes, and the geometry they share.

At a present pixel p of a lattice, with P the present pixels and W a k'_h × k'_w window around p,

    out(p) = k² / Σ_{q ∈ P ∩ W} c(q − p) · Σ_{q ∈ P ∩ W} weight(q − p) · x(q),

a cross-correlation over the present pixels divided by their local density (paper, section 4.1). It depends on the
density of points neither when they are thinned out nor, since the kernel is resampled with the lattice, when the
lattice is refined.

Resampled by overlap of cells (`CoordinateConvention.overlaps_cells`), a kernel covers the same part of the image on
every lattice: s = k·n/n_train pixels along an axis, its span. W is the smallest odd window that holds it. A tap is the
mean of the kernel over the cell of its pixel, zero beyond the span, and c is the part of the cell within the span. Away
from borders Σ c = s_h·s_w and Σ weight = (s_h·s_w / k²) · Σ of the trained kernel on a full lattice, so that a constant
keeps its gain at every size. Else the kernel is resampled bilinearly to a window of whole pixels, as published, and
c = 1. At the training resolution both are the kernel itself.

Letters: B batch, C channels, M points, H × W lattice, k kernel size at the training resolution, k'_h × k'_w shape of
the kernel at the resolution in use, s span.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F

from diffusion.coordinates import CoordinateConvention, Points, Size, scatter_points

Span = tuple[float, float]  # rows and columns of pixels that a kernel covers


def resampled_size(kernel_size: int, n: int, train_n: int) -> int:
    """Odd number of pixels, at least 3, that covers at n pixels what `kernel_size` pixels cover at `train_n`.

    k' = max(3, 2·round((k·n/n_train − 1)/2) + 1), halves rounded to even; k itself at the training size.
    """
    if n == train_n:
        return kernel_size
    return max(3, 2 * round((kernel_size * n / train_n - 1) / 2) + 1)


def resampled_shape(kernel_size: int, size: Size, train_size: Size) -> Size:
    """`resampled_size` along the two axes of a lattice: (k'_h, k'_w)."""
    return resampled_size(kernel_size, size[0], train_size[0]), resampled_size(kernel_size, size[1], train_size[1])


def kernel_window(
    kernel_size: int, size: Size, train_size: Size, convention: CoordinateConvention
) -> tuple[Size, Span | None]:
    """(k'_h, k'_w) and (s_h, s_w) at a lattice; no span where kernels are not resampled by overlap of cells."""
    if tuple(size) == tuple(train_size) or not convention.overlaps_cells:
        return resampled_shape(kernel_size, size, train_size), None
    rows, cols = (kernel_size * n / train_n for n, train_n in zip(size, train_size))
    return (2 * math.ceil((rows - 1) / 2) + 1, 2 * math.ceil((cols - 1) / 2) + 1), (rows, cols)


@lru_cache(maxsize=64)
def cell_overlaps(kernel_size: int, taps: int, span: float, device: torch.device) -> torch.Tensor:
    """Fraction of each of the k' cells of a window that each of the k cells of a kernel covers, float64 (k, k').

    In pixels around the middle, cell i of the kernel is [i·s/k, (i + 1)·s/k] − s/2, pixel t is [t, t + 1] − k'/2.
    """
    with torch.inference_mode(False):  # it is kept, and gradients may want it later
        cells = torch.arange(kernel_size + 1, dtype=torch.float64) * (span / kernel_size) - span / 2
        pixels = torch.arange(taps + 1, dtype=torch.float64) - taps / 2
        right, left = torch.minimum(cells[1:, None], pixels[1:]), torch.maximum(cells[:-1, None], pixels[:-1])
        return (right - left).clamp(min=0).to(device)


def coverage(kernel_shape: Size, span: Span, device: torch.device) -> torch.Tensor:
    """c of the module: float64 (k'_h, k'_w)."""
    rows, cols = (cell_overlaps(1, side, covered, device)[0] for side, covered in zip(kernel_shape, span))
    return rows[:, None] * cols


def resample_kernel(
    weight: torch.Tensor, kernel_shape: Sequence[int], span: Sequence[float] | None = None
) -> torch.Tensor:
    """Kernels (C_out, C_in/groups, k, k) resampled to (…, k'_h, k'_w): by overlap of cells, without a span bilinearly.

    Values are not rescaled: the division by the density, whose k² stays that of the training kernel, makes up for the
    larger number of taps.
    """
    if span is not None:
        rows, cols = (cell_overlaps(weight.shape[-1], *axis, weight.device) for axis in zip(kernel_shape, span))
        return (rows.T @ weight.double() @ cols).to(weight.dtype)  # float64: no autocast or TF32 rounds the kernel
    if tuple(weight.shape[-2:]) == tuple(kernel_shape):
        return weight
    return F.interpolate(weight, size=kernel_shape, mode="bilinear", align_corners=False)


def _window_lengths(n: int, taps: int, device: torch.device) -> torch.Tensor:
    """How many of n pixels lie in the window of `taps` pixels around each: (n,)."""
    i = torch.arange(n, device=device)
    return (i + taps // 2).clamp(max=n - 1) - (i - taps // 2).clamp(min=0) + 1


def _window_sums(x: torch.Tensor, dim: int, taps: int) -> torch.Tensor:
    """Sums over the window of `taps` entries around each along `dim`, those outside counting zero."""
    n, i = x.shape[dim], torch.arange(x.shape[dim], device=x.device)
    total = F.pad(x.transpose(dim, -1).cumsum(-1), (1, 0)).transpose(dim, -1)  # n + 1 entries along dim
    upper, lower = (i + taps // 2 + 1).clamp(max=n), (i - taps // 2).clamp(min=0)
    return total.index_select(dim, upper) - total.index_select(dim, lower)


def window_counts(points: Points, kernel_shape: Size, device: torch.device) -> torch.Tensor:
    """Number of present pixels in the window around each point, itself included: int64 (B, M), or (1, H·W) if full."""
    height, width = points.size
    if points.index is None:
        rows, cols = _window_lengths(height, kernel_shape[0], device), _window_lengths(width, kernel_shape[1], device)
        return (rows[:, None] * cols).view(1, -1)  # (1, HW)
    present = scatter_points(torch.ones_like(points.index).unsqueeze(2), points).squeeze(1)  # (B, H, W)
    counts = _window_sums(_window_sums(present, 1, kernel_shape[0]), 2, kernel_shape[1])
    return counts.flatten(1).gather(1, points.index)  # (B, M)


def covered_area(points: Points, kernel_shape: Size, span: Span, device: torch.device) -> torch.Tensor:
    """Σ c of the module's equation, in pixels: float64 (B, M), or (1, H·W) for a full lattice."""
    height, width = points.size
    if points.index is None:
        ones = (torch.ones(n, dtype=torch.float64, device=device) for n in (height, width))
        rows, cols = (_covered_sums(one, 0, side, covered) for one, side, covered in zip(ones, kernel_shape, span))
        return (rows[:, None] * cols).view(1, -1)  # (1, HW)
    present = scatter_points(torch.ones_like(points.index, dtype=torch.float64).unsqueeze(2), points).squeeze(1)
    area = _covered_sums(_covered_sums(present, 1, kernel_shape[0], span[0]), 2, kernel_shape[1], span[1])  # (B, H, W)
    return area.flatten(1).gather(1, points.index)  # (B, M)


def _covered_sums(x: torch.Tensor, dim: int, taps: int, span: float) -> torch.Tensor:
    """Sums of float64 over `span` pixels around each along `dim`: a fraction of the outermost counts."""
    if taps == 1:
        return x * span
    fraction = (span - taps + 2) / 2
    whole = _window_sums(x, dim, taps) if fraction > 0 else 0
    return fraction * whole + (1 - fraction) * _window_sums(x, dim, taps - 2)


def inverse_density(
    points: Points, kernel_shape: Size, kernel_size: int, device: torch.device, span: Span | None = None
) -> torch.Tensor:
    """k² / Σ c of the module's equation: float32 (B, M, 1), or (1, H·W, 1) for a full lattice, which is kept."""
    if points.index is None:
        return _on_full_lattice(tuple(points.size), tuple(kernel_shape), kernel_size, span, device)
    return _inverse_density(points, kernel_shape, kernel_size, span, device)


@lru_cache(maxsize=16)
def _on_full_lattice(
    size: Size, kernel_shape: Size, kernel_size: int, span: Span | None, device: torch.device
) -> torch.Tensor:
    with torch.inference_mode(False):  # gradients may want it later
        return _inverse_density(Points(size), kernel_shape, kernel_size, span, device)


def _inverse_density(
    points: Points, kernel_shape: Size, kernel_size: int, span: Span | None, device: torch.device
) -> torch.Tensor:
    if span is None:
        return kernel_size**2 / window_counts(points, kernel_shape, device).unsqueeze(2).float()
    return (kernel_size**2 / covered_area(points, kernel_shape, span, device)).unsqueeze(2).float()


@dataclass(frozen=True, eq=False)
class Plan:
    """What the blocks of one forward pass share.

    density: `inverse_density` of the points, or what computes it when first asked for.
    span: what kernels are resampled to by overlap of cells; None: bilinearly to `kernel_shape`, unless they have it.
    lattice: where the points' lattice is a window of a larger one, that one, which says how far apart pixels are.
    """

    points: Points
    batch: int
    kernel_shape: Size
    density: torch.Tensor | Callable[[], torch.Tensor]
    span: Span | None = field(default=None, kw_only=True)
    lattice: Size | None = field(default=None, kw_only=True)

    @cached_property
    def inverse_density(self) -> torch.Tensor:
        """k²/Σc of the points, float32 (B or 1, M, 1)."""
        return self.density() if callable(self.density) else self.density

    @property
    def device(self) -> torch.device:
        """Where the points are, and what is computed at them."""
        return self.inverse_density.device if self.points.index is None else self.points.index.device


def check_points(points: Points, batch: int, device: torch.device) -> None:
    """Raise ValueError unless there are points, laid out for the batch and the device; their ids are not read."""
    index = points.index
    if index is None:
        return
    if index.dtype != torch.int64 or index.ndim != 2 or index.shape[0] != batch or index.shape[1] == 0:
        raise ValueError(
            f"points.index is {index.dtype} of shape {tuple(index.shape)}; "
            f"accepted: torch.int64 of shape ({batch}, M) with M > 0"
        )
    if index.device.type != device.type or device.index not in (None, index.device.index):  # "cuda" is any of them
        raise ValueError(f"points.index is on {index.device}; accepted: {device}, where the features are")


def check_features(
    x: torch.Tensor, weight: torch.Tensor, plan: Plan, groups: int, residual: torch.Tensor | None
) -> None:
    """Raise ValueError unless features, kernel and residual fit the plan and each other."""
    expected = (plan.batch, plan.points.count)
    if x.ndim != 3 or tuple(x.shape[:2]) != expected:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: ({expected[0]}, {expected[1]}, C), that of the plan")
    if weight.ndim != 4 or weight.shape[1] * groups != x.shape[2] or weight.shape[0] % groups:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; accepted with {groups} groups and {x.shape[2]} channels: "
            f"(C_out, {x.shape[2] // groups}, k, k), C_out a multiple of {groups}"
        )
    if residual is not None and tuple(residual.shape) != (*expected, weight.shape[0]):
        raise ValueError(f"residual has shape {tuple(residual.shape)}; accepted: {(*expected, weight.shape[0])}")
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.device != plan.device:
            raise ValueError(f"{name} is on {tensor.device}; accepted: {plan.device}, where the plan is")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; accepted: floating point")
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; accepted: both float64, or neither")


def normalised(sums: torch.Tensor, plan: Plan, residual: torch.Tensor | None) -> torch.Tensor:
    """k²/count · sums, plus residual if given: the last step of a back end, in the dtype of the sums.

    sums: (B, M, C_out), fresh memory: the result takes its place where no gradient is wanted. The factor stays float32.
    """
    if torch.is_grad_enabled():
        out = (sums * plan.inverse_density).to(sums.dtype)
        return out if residual is None else residual + out
    out = sums.mul_(plan.inverse_density)
    if residual is None:
        return out
    return out.add_(residual) if residual.dtype == out.dtype else residual + out


P = TypeVar("P", bound=Plan)


class Backend(Protocol[P]):
    """A way to compute the convolution above; all back ends give the same numbers up to rounding."""

    @property
    def name(self) -> str:
        """What `model.backend` calls it."""

    @property
    def depthwise(self) -> bool:
        """Whether it computes depthwise convolutions."""

    @property
    def plain(self) -> bool:
        """Whether everything else of a network is to be computed in plain PyTorch too."""

    def plan(
        self,
        points: Points,
        batch: int,
        kernel_shape: Size,
        kernel_size: int,
        device: torch.device,
        span: Span | None = None,
    ) -> P:
        """Prepare one forward pass. `kernel_size` is k, `kernel_shape` and `span` are those of `kernel_window`."""

    def conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        plan: P,
        groups: int,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """out of the module's equation, plus `residual` if given: (B, M, C) to (B, M, C_out).

        `weight` (C_out, C/groups, k, k) is the kernel of the training resolution; the back end resamples it as
        `resample_kernel` does for `plan.kernel_shape` and `plan.span`.
        """
