"""Cell averages of simple functions on a lattice: the pixels of a function seen without aliasing.

Lengths are in units of the square [0, 1]²; arguments are floats or tensors that broadcast with the lattice (..., H, W).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cells:
    """The cells of a lattice (H, W) by their centres, y (H, 1) downwards and x (W)."""

    size: tuple[int, int]
    y: torch.Tensor
    x: torch.Tensor

    @classmethod
    def of(cls, size: tuple[int, int]) -> Cells:
        y, x = ((torch.arange(n) + 0.5) / n for n in size)
        return cls(size, y[:, None], x)


def half_plane(
    cells: Cells, g: torch.Tensor, slope_y: torch.Tensor | float, slope_x: torch.Tensor | float
) -> torch.Tensor:
    """Part of each cell in which the linear function with value g at the centre and the given gradient is positive.

    Exact: over a rectangle the value of a linear function has a trapezoidal density, the convolution of two boxes as
    wide as its change along each axis; this is the distribution function. For a curved edge it is the coverage by
    the tangent half-plane, off by the second order in the pixel size.
    """
    change_y, change_x = (torch.as_tensor(s).abs() / n for s, n in zip((slope_y, slope_x), cells.size))
    wide = torch.maximum(change_y, change_x).clamp(min=1e-6)
    narrow = (torch.minimum(change_y, change_x) / wide).clamp(min=1e-3)  # float32 cancels below
    inner, outer = (1 - narrow) / 2, (1 + narrow) / 2
    t = torch.minimum(torch.maximum(g / wide, -outer), outer)
    squares = (t + outer).square() - (t + inner).clamp(min=0).square() - (t - inner).clamp(min=0).square()
    return squares / (2 * narrow)


def ellipse(cells: Cells, cy, cx, ry, rx) -> torch.Tensor:
    """Coverage of each cell by the ellipse with centre (cy, cx) and semi-axes (ry, rx)."""
    v, w = (cells.y - cy) / ry, (cells.x - cx) / rx
    norm = (v.square() + w.square()).sqrt().clamp(min=1e-4)
    return half_plane(cells, 1 - norm, v / (ry * norm), w / (rx * norm))


def rounded_box(cells: Cells, cy, cx, half_y, half_x, radius) -> torch.Tensor:
    """Coverage of each cell by the points within `radius` of the box with centre (cy, cx) and the given half sides."""
    v, w = cells.y - cy, cells.x - cx
    v, w = v.sign() * (v.abs() - half_y).clamp(min=0), w.sign() * (w.abs() - half_x).clamp(min=0)
    distance = (v.square() + w.square()).sqrt()
    safe = distance.clamp(min=1e-6)
    return half_plane(cells, radius - distance, v / safe, w / safe)


def gaussian(cells: Cells, cy, cx, std_y, std_x) -> torch.Tensor:
    """Cell averages of exp(−(y−cy)²/2·std_y² − (x−cx)²/2·std_x²), by differences of the error function."""

    def axis(offset: torch.Tensor, std: torch.Tensor | float, n: int) -> torch.Tensor:
        scale = math.sqrt(2) * std
        difference = torch.erf((offset + 0.5 / n) / scale) - torch.erf((offset - 0.5 / n) / scale)
        return difference * std * n * math.sqrt(math.pi / 2)

    return axis(cells.y - cy, std_y, cells.size[0]) * axis(cells.x - cx, std_x, cells.size[1])


def wave(cells: Cells, cycles_y, cycles_x, phase) -> torch.Tensor:
    """Cell averages of sin 2π(cycles_y·y + cycles_x·x + phase): the wave times the transfer of the pixel box."""
    height, width = cells.size
    transfer = torch.sinc(torch.as_tensor(cycles_y / height)) * torch.sinc(torch.as_tensor(cycles_x / width))
    return transfer * torch.sin(2 * math.pi * (cycles_y * cells.y + cycles_x * cells.x + phase))
