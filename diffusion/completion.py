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
from dataclasses import dataclass

import torch

from diffusion.conditioning import fill_unknown
from diffusion.coordinates import Size, size_of
from diffusion.cosine import dct, idct, on_rows
from diffusion.posterior import conjugate_residuals

_NUGGET = 1e-4  # of the variance: what known values are taken to be off by, lest solving take for ever
_ITERATIONS, _TOLERANCE = 100, 1e-4
_AT_ONCE = 1 << 16  # values; of each as many numbers are held as there are iterations, twice
_LEAST = 1e-9  # of the variance: S of waves that the data do not have
_FIELDS, _ROUNDS = 64, 12  # with which S is measured, and how often


@dataclass(frozen=True)
class Moments:
    """S at frequencies 0, 1/n, 2/n, … for the smaller side n of a lattice, linear between, constant beyond.

    values: (V, C, C), positive definite. size: the lattice, (H, W), on which white noise of unit variance has S = 1.
    """

    values: torch.Tensor
    size: Size

    def at(self, size: Size) -> torch.Tensor:
        """S for the waves of a lattice, (H, W, C, C): powers are in proportion to the pixels."""
        place = _place(size, self.size).clamp(max=len(self.values) - 1)
        below = place.floor().long().clamp(max=len(self.values) - 2)
        part = (place - below)[..., None, None]
        return torch.lerp(self.values[below], self.values[below + 1], part) * (math.prod(size) / math.prod(self.size))


def measure_moments(fields: torch.Tensor, generator: torch.Generator) -> Moments:
    """S of fields (N, C, H, W), NaN where not known: that which fields completed by it have.

    It is drawn with and measured in turn, from smooth fields on; this is stochastic EM (Celeux & Diebolt 1985).
    """
    fields = fields[:_FIELDS].double()
    moments = _moments(fill_unknown(fields))
    for _ in range(_ROUNDS if fields.isnan().any() else 0):
        moments = _moments(completed(fields, moments, generator))
    return moments


def _moments(fields: torch.Tensor) -> Moments:
    size, channels = size_of(fields), fields.shape[1]
    waves = on_rows(dct, dct(fields)).flatten(2)
    outer = torch.einsum("nik,njk->kij", waves, waves) / len(fields)
    least = _LEAST * outer.mean(0).diagonal().diag() + 1e-30 * torch.eye(channels, dtype=torch.float64)
    place = _place(size, size).flatten()
    weights = (1 - (place - torch.arange(int(place.max()) + 1)[:, None]).abs()).clamp(min=0)
    return Moments(torch.einsum("vk,kij->vij", weights / weights.sum(1, keepdim=True), outer) + least, size)


def _place(size: Size, own: Size) -> torch.Tensor:
    """Frequencies of the waves of a lattice, (H, W), in units of 1/n for the smaller side n of the own lattice."""
    k, l = (torch.arange(n, dtype=torch.float64) / m for n, m in zip(size, own))  # noqa: E741 (of the formula)
    return torch.hypot(k[:, None], l) * min(own)


def completed(fields: torch.Tensor, moments: Moments, generator: torch.Generator) -> torch.Tensor:
    """Fields (B, C, H, W), NaN where not known, with draws of p(unknown | known) there; float64.

    From a draw u of the field and a draw e of variance 2 ε, x = u + S Hᵗ (H S Hᵗ + ε)⁻¹ (y - H u + e), with H the known
    points, y their values. Without e, x would be too smooth: waves that are known to about ε would lose up to half of
    their power.
    """
    spectrum = moments.at(size_of(fields))
    root = torch.linalg.cholesky(spectrum)
    nugget = _NUGGET * spectrum.diagonal(dim1=-2, dim2=-1).mean((0, 1))[:, None, None]
    parts = []
    for some in fields.double().split(max(1, _AT_ONCE // fields[0].numel())):
        white = torch.randn(some.shape, generator=generator, dtype=torch.float64)
        drawn = _waves(torch.einsum("hwij,bjhw->bihw", root, white))
        known = some.isfinite().all(1, keepdim=True).expand_as(some)

        def product(w: torch.Tensor, known: torch.Tensor = known) -> torch.Tensor:
            w = w.view_as(known)
            return torch.where(known, _filtered(spectrum, w) + nugget * w, 0.0).flatten(1)

        error = (2 * nugget).sqrt() * torch.randn(some.shape, generator=generator, dtype=torch.float64)
        missed = torch.where(known, some - drawn + error, 0.0).flatten(1)
        weights = conjugate_residuals(product, missed, _ITERATIONS, _TOLERANCE).view_as(some)
        parts.append(torch.where(known, some, drawn + _filtered(spectrum, weights)))
    return torch.cat(parts)


def _waves(coefficients: torch.Tensor) -> torch.Tensor:
    return idct(on_rows(idct, coefficients))


def _filtered(spectrum: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _waves(torch.einsum("hwij,bjhw->bihw", spectrum, on_rows(dct, dct(x))))
