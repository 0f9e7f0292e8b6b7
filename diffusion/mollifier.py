"""The mollifier T: the Gaussian smoothing that turns white noise, which is no function, into one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from diffusion.by_frequency import ByFrequency
from diffusion.coordinates import Size, size_of
from diffusion.cosine import CACHED_MATRICES, FFT_FROM, cosine_matrix, dct, idct, on_rows, times_matrix


class InverseSnr(ByFrequency):
    """The ratio of noise to signal amplitudes in mollified images, by frequency."""


@dataclass(frozen=True)
class Mollifier:
    """T, a Gaussian of standard deviation `sigma` pixels at the training resolution, with reflecting boundary.

    At resolution (H, W) it is σ_h and σ_w pixels wide, and multiplies the cosine coefficient (k, l) by

        g = exp(-π² (σ_h² k² / H² + σ_w² l² / W²) / 2).

    It is one operator on functions. At r times the resolution σ is r times as many pixels. White noise is multiplied by
    r there (`noise_scale`), so that Tξ has the same variance.

    sigma: 0 or more, in pixels of `train_size`; 0 makes T the identity, for tensors of any shape.
    train_size: (N_h, N_w), the training resolution.
    kind: a name in `MOLLIFIERS`. "dct" is exact. "conv" is cut off at side ⌈4σ + 1⌉ with mirrored pixels, and has no
        inverse.
    Calling it maps x (..., H, W) of any floating dtype to Tx; half precision is computed in float32.
    Source: section 3.2.
    """

    sigma: float
    train_size: Size
    kind: str = "dct"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"mollifier sigma is {self.sigma}; accepted: a finite number of pixels, 0 or more")
        if len(self.train_size) != 2 or min(self.train_size) < 1:
            raise ValueError(f"mollifier train_size is {self.train_size}; accepted: (H, W), both at least 1")
        if self.kind not in MOLLIFIERS:
            raise ValueError(f"mollifier kind is {self.kind!r}; accepted: {', '.join(MOLLIFIERS)}")

    @property
    def identity(self) -> bool:
        """Whether T is the identity (sigma = 0): white-noise diffusion, section 3.1."""
        return self.sigma == 0

    def sigmas(self, size: Size) -> tuple[float, float]:
        """Standard deviation of T along rows and columns in pixels at resolution `size`."""
        return self.sigma * size[0] / self.train_size[0], self.sigma * size[1] / self.train_size[1]

    def noise_scale(self, size: Size) -> float:
        """Standard deviation of white noise at resolution `size`: 1 at that of training, and if T is the identity."""
        return 1.0 if self.identity else math.sqrt(math.prod(size) / math.prod(self.train_size))

    def gain(self, size: Size) -> torch.Tensor:
        """The factors g in (0, 1] of the cosine coefficients at resolution `size`, float64 (H, W)."""
        self._require_spectrum("gain")
        return torch.outer(*map(_gains, size, self.sigmas(size)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.identity:
            return x
        work, (sigma_h, sigma_w) = self._working_copy(x)
        work = on_rows(partial(_smooth, sigma=sigma_h, kind=self.kind), _smooth(work, sigma_w, self.kind))
        return work.to(x.dtype)

    def noise(self, white: torch.Tensor) -> torch.Tensor:
        """The mollified noise Tξ (B, C, H, W) of white noise of unit variance at any resolution."""
        if self.identity:
            return white
        work = white.to(torch.promote_types(white.dtype, torch.float32))
        return (self(work) * self.noise_scale(size_of(white))).to(white.dtype)

    def frequencies(self, size: Size) -> torch.Tensor:
        """√((k/N_h)² + (l/N_w)²) of the cosine coefficients (k, l) at a resolution, float64 (H, W).

        1 is the finest wave along an axis at the training resolution; g = exp(-π² σ² frequency² / 2) at every one.
        """
        k, l = (torch.arange(n, dtype=torch.float64) / own for n, own in zip(size, self.train_size))  # noqa: E741
        return torch.hypot(k[:, None], l[None, :])

    def inverse(self, x: torch.Tensor, inv_snr: float | InverseSnr = 0.05) -> torch.Tensor:
        """Undo T by the Wiener filter, coefficients times g / (g² + inv_snr²); x (..., H, W).

        inv_snr: ratio of noise to signal amplitudes, above 0: a number, with which the amplification is at most
            1 / (2 · inv_snr), or one for each frequency.
        """
        if self.identity:
            return x
        self._require_spectrum("inverse")
        ratio: float | torch.Tensor
        if isinstance(inv_snr, InverseSnr):
            ratio = inv_snr.at(self.frequencies(size_of(x))).to(x.device)
        elif inv_snr > 0:
            ratio = inv_snr
        else:
            raise ValueError(f"inv_snr is {inv_snr}; accepted: a number above 0")
        work, sigmas = self._working_copy(x)
        rows, cols = (_gains_on(n, sigma, work.dtype, work.device) for n, sigma in zip(size_of(x), sigmas))
        gain = torch.outer(rows, cols)
        coefficients = on_rows(dct, dct(work)) * (gain / (gain**2 + ratio**2)).to(work.dtype)
        return idct(on_rows(idct, coefficients)).to(x.dtype)

    def _working_copy(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}; accepted by the mollifier: floating images (..., H, W)"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32)), self.sigmas(size_of(x))

    def _require_spectrum(self, name: str) -> None:
        if self.kind != "dct":
            raise ValueError(f"mollifier kind is {self.kind!r}; accepted: 'dct', since only this has the {name}")


def _smooth(x: torch.Tensor, sigma: float, kind: str) -> torch.Tensor:
    """Smooth along the last axis. T is separable, and per axis a fixed symmetric matrix: one product does it."""
    n = x.shape[-1]
    if kind == "dct" and n >= FFT_FROM:
        return idct(dct(x) * _gains_on(n, sigma, x.dtype, x.device))
    return times_matrix(x, partial(_smoothing_matrix, n, sigma, kind))


def _gains(n: int, sigma: float) -> torch.Tensor:
    """exp(-(πσk/n)²/2) for k = 0 … n-1, float64."""
    return torch.exp(-0.5 * (math.pi * sigma / n * torch.arange(n, dtype=torch.float64)) ** 2)


@lru_cache(maxsize=CACHED_MATRICES)
def _gains_on(n: int, sigma: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`_gains`, copied to a device once: samplers ask at every step, and a copy makes a GPU wait for the host."""
    return _gains(n, sigma).to(device, dtype)


@lru_cache(maxsize=CACHED_MATRICES)
def _smoothing_matrix(n: int, sigma: float, kind: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix (n, n) of T along one axis, built in float64; x @ matrix smooths rows."""
    return MOLLIFIERS[kind](n, sigma).to(device, dtype)


def _exact_gaussian(n: int, sigma: float) -> torch.Tensor:
    """The Gaussian with reflecting boundary."""
    basis = cosine_matrix(n)
    return basis.mT * _gains(n, sigma) @ basis


def _mirrored_gaussian(n: int, sigma: float) -> torch.Tensor:
    """Normalised Gaussian of odd side ⌈4σ + 1⌉ (one more if even), mirrored at the outermost pixels."""
    radius = math.ceil(4 * sigma + 1) // 2
    if radius >= n:
        raise ValueError(
            f"image side is {n} pixels; accepted: above {radius}, the reach of the 'conv' mollifier of sigma {sigma:g}"
        )
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.softmax(-0.5 * (offsets.double() / sigma) ** 2, dim=0)
    pixels = (torch.arange(n).unsqueeze(1) + offsets).abs()
    pixels = torch.where(pixels < n, pixels, 2 * (n - 1) - pixels)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, pixels, weights.expand(n, -1).contiguous()).mT


# T along an axis of n pixels as a matrix, float64 (n, n); x @ matrix smooths rows. Given its standard deviation.
MOLLIFIERS: dict[str, Callable[[int, float], torch.Tensor]] = {"dct": _exact_gaussian, "conv": _mirrored_gaussian}

IDENTITY = Mollifier(0.0, (1, 1))
