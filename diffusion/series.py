"""A sampled function as its cosine series: values and derivatives at any points of the unit square.

Samples on a lattice (H, W), pixel (i, j) at ((i + ½)/H, (j + ½)/W), have orthonormal DCT-II coefficients F. The series

    f(y, x) = Σ_kl F_kl φ_k(y) ψ_l(x),    φ_k(y) = √(2/H) cos(πky),  φ_0 = √(1/H),  ψ likewise of W,

passes through every sample. The mollifier is diagonal in the same basis, so the series of T x_0 is T of the series.
"""

from __future__ import annotations

import math

import torch
from torch.utils.checkpoint import checkpoint

from diffusion.coordinates import Size, size_of
from diffusion.cosine import dct, on_rows

_AT_ONCE = 1 << 22  # numbers held for a block of points
_MOST_DERIVED = 2


def series_values(
    samples: torch.Tensor,
    coordinates: torch.Tensor,
    order: tuple[int, int] = (0, 0),
    band: Size | None = None,
    sides: torch.Tensor | None = None,
) -> torch.Tensor:
    """The derivative ∂^(i+j) f / ∂y^i ∂x^j at points, by default the value f.

    Costs P·H·W products, taken in blocks, and holds P·(H + W) numbers or a bounded part of them. Gradients with respect
    to samples and coordinates are followed; they are held in blocks too.

    Args:
        samples: (B, C, H, W), floating and finite. Half precision is computed in float32.
        coordinates: (P, 2) for all, or (B, P, 2): y, then x, both in [0, 1].
        order: (i, j), at most 2 together.
        band: (h, w): only coefficients k < h, l < w count, those that a lattice (h, w) has; all by default.
        sides: (P, 2), to take the mean over a rectangle of this height and width about each point, of the series
            reflected at the edges of the square. A side of 0 has no extent.
    Returns:
        (B, C, P), at least float32.
    Raises:
        ValueError: for anything else.
    """
    size = _check(samples, coordinates, order)
    rows, cols = size if band is None else (min(own, wanted) for own, wanted in zip(size, band))
    if min(rows, cols) < 1:
        raise ValueError(f"band is {band}; accepted: (h, w), both at least 1")
    work = samples.to(torch.promote_types(samples.dtype, torch.float32))
    # A GPU may round products of float32 to TF32, but not those of float64 (`cosine.times_matrix`).
    spectrum = on_rows(dct, dct(work))[..., :rows, :cols].to(torch.float64 if work.is_cuda else work.dtype)
    coordinates = coordinates[None] if coordinates.ndim == 2 else coordinates
    held = rows * len(coordinates) + cols * (len(coordinates) + len(samples) * samples.shape[1])

    def block(points: torch.Tensor, about: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
        with torch.autocast(points.device.type, enabled=False):
            along_y, along_x = (  # (B | 1, 1, P, h) and (B | 1, 1, P, w)
                _basis(points[..., i], about[..., i], size[i], count, order[i]).to(spectrum.dtype)[:, None]
                for i, count in enumerate((rows, cols))
            )
            return ((along_y @ spectrum) * along_x).sum(-1)

    parts = []
    sides = torch.zeros_like(coordinates[0]) if sides is None else sides
    at_once = max(1, _AT_ONCE // held)
    for given in zip(coordinates.split(at_once, dim=1), sides.split(at_once)):
        many = torch.is_grad_enabled() and at_once < coordinates.shape[1]  # more than one block is not held
        parts.append(checkpoint(block, *given, spectrum, use_reentrant=False) if many else block(*given, spectrum))
    return torch.cat(parts, dim=-1).to(work.dtype)


def on_lattice(samples: torch.Tensor, size: Size) -> torch.Tensor:
    """Samples (B, C, H, W) read at the pixels of another lattice (h, w), by their cosine series."""
    axes = [(torch.arange(n, dtype=torch.float64, device=samples.device) + 0.5) / n for n in size]
    return series_values(samples, torch.cartesian_prod(*axes)).unflatten(-1, size)


def _basis(places: torch.Tensor, sides: torch.Tensor, n: int, count: int, order: int) -> torch.Tensor:
    """The order-th derivatives of φ_0 … φ_{count-1} of an axis of n samples at places (B, P): float64 (B, P, count).

    They are means over intervals of lengths `sides` (P,) about the places, by the factor sinc(k side / 2) of cos πky.
    In float64, since an error of a place is multiplied by πk.
    """
    wave = math.pi * torch.arange(count, dtype=torch.float64, device=places.device)
    scale = torch.full_like(wave, math.sqrt(2 / n)) * wave**order
    scale[0] *= math.sqrt(0.5)
    angle = places.double()[..., None] * wave
    scale = scale * torch.sinc(sides.double()[:, None] * wave / (2 * math.pi))
    return scale * (-angle.sin() if order == 1 else angle.cos() if order == 0 else -angle.cos())


def _check(samples: torch.Tensor, coordinates: torch.Tensor, order: tuple[int, int]) -> Size:
    if samples.ndim != 4 or 0 in samples.shape or not samples.is_floating_point():
        raise ValueError(f"samples are {samples.dtype} {tuple(samples.shape)}; accepted: floating (B, C, H, W)")
    if not samples.isfinite().all():
        raise ValueError("samples are not finite; accepted: finite values at every pixel of the lattice")
    batched = coordinates.ndim == 3 and len(coordinates) == len(samples)
    if not (coordinates.ndim == 2 or batched) or coordinates.shape[-1] != 2 or not coordinates.is_floating_point():
        raise ValueError(
            f"coordinates are {coordinates.dtype} {tuple(coordinates.shape)}; accepted: floating (P, 2), or "
            f"({len(samples)}, P, 2), y before x"
        )
    if not ((coordinates >= 0) & (coordinates <= 1)).all():
        raise ValueError("coordinates leave the unit square or are not finite; accepted: y and x from 0 to 1")
    if len(order) != 2 or min(order) < 0 or sum(order) > _MOST_DERIVED:
        raise ValueError(f"order is {order}; accepted: (i, j), times derived along y and x, at most {_MOST_DERIVED}")
    return size_of(samples)
