"""The depthwise convolution in plain PyTorch: for each tap, gather, multiply and add its pairs of present pixels.

Used for float64, and on a CPU without a C compiler where points are few. Letters: B batch, C channels, M points, K
taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from diffusion.coordinates import Points, Size


@dataclass(frozen=True, eq=False)
class PairList:
    """For each tap, the rows (targets, sources) of the points p and q = p + offset of the tap that are both present.

    Rows are counted through the batch.
    """

    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    counts: None = None  # of the windows, which are not counted


def neighbours(points: Points, batch: int, kernel_shape: Size, device: torch.device) -> PairList:
    """The pairs of every tap of a window of `kernel_shape` pixels."""
    (height, width), (kh, kw) = points.size, kernel_shape
    row, col = points.rows_cols(device)
    first = torch.arange(batch, device=device)[:, None]
    own = torch.arange(points.count, device=device) + first * points.count  # (B, M)
    lattice = torch.full((batch, height, width), -1, device=device)
    lattice[first, row, col] = own
    lattice = F.pad(lattice, (kw // 2, kw // 2, kh // 2, kh // 2), value=-1)
    pairs = []
    for tap in range(kh * kw):
        other = lattice[first, row + tap // kw, col + tap % kw]  # (B, M)
        present = other >= 0
        pairs.append((own[present], other[present]))
    return PairList(pairs)


def list_bytes(points: Points, batch: int, kernel_shape: Size) -> int:
    """Bytes of a `PairList` that points spread evenly take; borders have fewer."""
    density = points.count / (points.size[0] * points.size[1])
    return round(16 * batch * points.count * kernel_shape[0] * kernel_shape[1] * density)


def depthwise(
    x: torch.Tensor, taps: torch.Tensor, scale: torch.Tensor, neighbours: PairList, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """out(p) = scale(p) · Σ taps(q − p) · x(q), plus residual: (B, M, C) in the dtype of x, summed in float32 at least.

    taps: (K, C). scale: (B or 1, M, 1). Differentiable in x, taps and residual.
    """
    source = x.to(torch.promote_types(x.dtype, torch.float32))
    out = _Depthwise.apply(source.flatten(0, 1), taps.to(source.dtype), neighbours.pairs)
    out = (out.view_as(source) * scale).to(x.dtype)
    return out if residual is None else residual + out


class _Depthwise(torch.autograd.Function):
    """Σ taps(q − p) · x(q) over rows (B·M, C); the backward pass gathers again, so that no product is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, taps: torch.Tensor, pairs: list) -> torch.Tensor:
        ctx.save_for_backward(x, taps)
        ctx.pairs = pairs
        out = torch.zeros_like(x)
        for tap, (target, source) in zip(taps, pairs):
            out.index_add_(0, target, x[source] * tap)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, taps = ctx.saved_tensors
        dx, dtaps = torch.zeros_like(x), torch.empty_like(taps)
        for k, (target, source) in enumerate(ctx.pairs):
            g = gradient[target]
            dx.index_add_(0, source, g * taps[k])
            dtaps[k] = (g * x[source]).sum(0)
        return dx, dtaps, None
