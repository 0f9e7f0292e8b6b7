"""Fields known in part, completed by draws with the second moments of the data.

A state is a T x_0 + b T ξ, and T needs values everywhere. Where points are unknown independently of the values, known
values together with a draw of the others given them are distributed as whole fields are. So a network that is trained
on such completed fields, and scored at known points alone, learns what whole fields would teach it. With the mean in
place of a draw, a completed field would be smoother than data, and fine waves of T x_0 too weak.

Fields are taken as Gaussian here: their cosine coefficients (C,) of a wave of frequency ω have the second moments
S(ω), C×C, independently of other waves. S is what the completed fields themselves have (`measure_moments`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffusion.coordinates import Size, size_of
from diffusion.cosine import dct, idct, on_rows
from diffusion.posterior import conjugate_residuals

_NUGGET = 1e-6  # of the variance: what known values are off by, lest solving take for ever
_ITERATIONS, _TOLERANCE = 200, 1e-3
_TOGETHER = 32
_ROUNDS = 12  # of drawing and measuring


@dataclass(frozen=True)
class Moments:
    """S at frequencies 0, 1/n, 2/n, … for the smaller side n of a lattice, linear between, constant beyond.

    values: (V, C, C), positive definite. size: the lattice, (H, W), on which white noise of unit variance has S = 1.
    """

    values: torch.Tensor
    size: Size

    def at(self, size: Size) -> torch.Tensor:
        """S for the waves of a lattice, (H, W, C, C): powers are in proportion to the pixels."""
        k, l = (torch.arange(n, dtype=torch.float64) / own for n, own in zip(size, self.size))  # noqa: E741
        place = (torch.hypot(k[:, None], l) * min(self.size)).clamp(max=len(self.values) - 1)
        below = place.floor().long().clamp(max=len(self.values) - 2)
        part = (place - below)[..., None, None]
        return torch.lerp(self.values[below], self.values[below + 1], part) * (math.prod(size) / math.prod(self.size))


def completed(fields: torch.Tensor, moments: Moments, generator: torch.Generator) -> torch.Tensor:
    """Fields (B, C, H, W), NaN where not known, with draws of p(unknown | known) there; float64.

    From a draw u of the field, x = u + S Hᵗ (H S Hᵗ + ε)⁻¹ (y - H u), with H the known points, y their values.
    """
    values, size = fields.double(), size_of(fields)
    known = values.isfinite().all(1, keepdim=True).expand_as(values)
    spectrum = moments.at(size)
    root = torch.linalg.cholesky(spectrum)
    white = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    drawn = _waves(torch.einsum("hwij,bjhw->bihw", root, white))
    nugget = _NUGGET * spectrum.diagonal(dim1=-2, dim2=-1).mean((0, 1))[:, None, None]

    def product(w: torch.Tensor) -> torch.Tensor:
        w = w.view_as(values)
        return torch.where(known, _filtered(spectrum, w) + nugget * w, 0.0).flatten(1)

    missed = torch.where(known, values - drawn, 0.0).flatten(1)
    weights = conjugate_residuals(product, missed, _ITERATIONS, _TOLERANCE).view_as(values)
    return torch.where(known, values, drawn + _filtered(spectrum, weights))


def _waves(coefficients: torch.Tensor) -> torch.Tensor:
    return idct(on_rows(idct, coefficients))


def _filtered(spectrum: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _waves(torch.einsum("hwij,bjhw->bihw", spectrum, on_rows(dct, dct(x))))
