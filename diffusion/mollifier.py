"""The mollifier T: the Gaussian smoothing that turns white noise, which is no function, into one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from diffusion.coordinates import Size
from diffusion.cosine import CACHED_MATRICES, FFT_FROM, cosine_matrix, dct, idct, on_rows, times_matrix

KINDS = ("dct", "conv")


@dataclass(frozen=True)
class InverseSnr:
    """The ratio of noise to signal amplitudes in mollified images, by frequency (see `Mollifier.frequencies`).

    spacing: between the frequencies 0, spacing, 2 · spacing, … of the values, above 0.
    values: the ratios there, above 0. Between them logarithms are linear; beyond the last it stays as it is.
    """

    spacing: float
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 < self.spacing < math.inf:
            raise ValueError(f"spacing is {self.spacing}; it must be a finite number above 0")
        if not self.values or not all(0 < value < math.inf for value in self.values):
            raise ValueError(f"values are {self.values}; they must be finite numbers above 0, at least one")

    def at(self, frequency: torch.Tensor) -> torch.Tensor:
        """The ratio at frequencies ≥ 0, float64 of their shape, on the CPU."""
        logs = torch.tensor([*self.values, self.values[-1]], dtype=torch.float64).log()
        position = (frequency.double().cpu() / self.spacing).clamp(max=len(self.values) - 1)
        below = position.floor().long()
        return torch.lerp(logs[below], logs[below + 1], position - below).exp()


@dataclass(frozen=True)
class Mollifier:
    """T, a Gaussian of standard deviation `sigma` pixels of the training lattice, with reflecting boundary.

    On an (H, W) lattice, where it is σ_h and σ_w pixels wide, T multiplies the cosine coefficient (k, l) by

        g = exp(-π² (σ_h² k² / H² + σ_w² l² / W²) / 2).

    It is one operator on functions: on a lattice r times finer σ is r times as many pixels, and the white noise of the
    training lattice becomes white noise times r (`noise_scale`), so that Tξ has the same variance there.

    sigma: 0 or more, in pixels of `train_size`; 0 makes T the identity, for tensors of any shape.
    train_size: (N_h, N_w).
    kind: "dct", exact; or "conv", a Gaussian cut off at side ⌈4σ + 1⌉ with mirrored pixels, which has no inverse.
    Calling it maps x (..., H, W) of any floating dtype to Tx; half precision is computed in float32.
    Source: section 3.2.
    """

    sigma: float
    train_size: Size
    kind: str = "dct"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"mollifier sigma is {self.sigma}; it must be a finite number of pixels, 0 or more")
        if len(self.train_size) != 2 or min(self.train_size) < 1:
            raise ValueError(f"mollifier train_size is {self.train_size}; it must be (H, W), both at least 1")
        if self.kind not in KINDS:
            raise ValueError(f"mollifier kind is {self.kind!r}; accepted are {', '.join(KINDS)}")

    @property
    def identity(self) -> bool:
        """Whether T is the identity (sigma = 0): white-noise diffusion, section 3.1."""
        return self.sigma == 0

    def sigmas(self, size: Size) -> tuple[float, float]:
        """Standard deviation of T along rows and columns in pixels of a lattice `size`."""
        return self.sigma * size[0] / self.train_size[0], self.sigma * size[1] / self.train_size[1]

    def noise_scale(self, size: Size) -> float:
        """Standard deviation of white noise on a lattice that is 1 on the training lattice; always 1 without T."""
        return 1.0 if self.identity else math.sqrt(math.prod(size) / math.prod(self.train_size))

    def gain(self, size: Size) -> torch.Tensor:
        """The factors g in (0, 1] of the cosine coefficients of a lattice, float64 (H, W)."""
        self._require_spectrum("gain")
        return torch.outer(*map(_gains, size, self.sigmas(size)))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.identity:
            return x
        work, (sigma_h, sigma_w) = self._working_copy(x)
        work = on_rows(partial(_smooth, sigma=sigma_h, kind=self.kind), _smooth(work, sigma_w, self.kind))
        return work.to(x.dtype)

    def noise(self, white: torch.Tensor) -> torch.Tensor:
        """The mollified noise Tξ (B, C, H, W) of white noise of unit variance on any lattice."""
        work = white.to(torch.promote_types(white.dtype, torch.float32))
        return (self(work) * self.noise_scale(white.shape[-2:])).to(white.dtype)

    def frequencies(self, size: Size) -> torch.Tensor:
        """√((k/N_h)² + (l/N_w)²) of the cosine coefficients (k, l) of a lattice, float64 (H, W).

        1 is the finest wave along an axis of the training lattice; g = exp(-π² σ² frequency² / 2) on every lattice.
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
        if isinstance(inv_snr, InverseSnr):
            inv_snr = inv_snr.at(self.frequencies(x.shape[-2:])).to(x.device)
        elif not inv_snr > 0:
            raise ValueError(f"inv_snr is {inv_snr}; the Wiener filter needs a number above 0")
        work, sigmas = self._working_copy(x)
        rows, cols = (_gains_on(n, sigma, work.dtype, work.device) for n, sigma in zip(x.shape[-2:], sigmas))
        gain = torch.outer(rows, cols)
        coefficients = on_rows(dct, dct(work)) * (gain / (gain**2 + inv_snr**2)).to(work.dtype)
        return idct(on_rows(idct, coefficients)).to(x.dtype)

    def _working_copy(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
        if x.ndim < 2 or not x.is_floating_point():
            raise ValueError(
                f"the mollifier takes floating images (..., H, W), not {x.dtype} of shape {tuple(x.shape)}"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32)), self.sigmas(x.shape[-2:])

    def _require_spectrum(self, name: str) -> None:
        if self.kind != "dct":
            raise ValueError(f"the {self.kind!r} mollifier has no {name}; use kind 'dct'")


IDENTITY = Mollifier(0.0, (1, 1))


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
    if kind == "conv":
        return _mirrored_gaussian(n, sigma).mT.to(device, dtype)
    basis = cosine_matrix(n)
    return (basis.mT * _gains(n, sigma) @ basis).to(device, dtype)


def _mirrored_gaussian(n: int, sigma: float) -> torch.Tensor:
    """Normalised Gaussian of odd side ⌈4σ + 1⌉ (one more if even), mirrored at the outermost pixels, float64 (n, n)."""
    radius = math.ceil(4 * sigma + 1) // 2
    if radius >= n:
        raise ValueError(
            f"the 'conv' mollifier reaches {radius} pixels; an axis of {n} pixels is too short for sigma {sigma}"
        )
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.softmax(-0.5 * (offsets.double() / sigma) ** 2, dim=0)
    pixels = (torch.arange(n).unsqueeze(1) + offsets).abs()
    pixels = torch.where(pixels < n, pixels, 2 * (n - 1) - pixels)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, pixels, weights.expand(n, -1).contiguous())
