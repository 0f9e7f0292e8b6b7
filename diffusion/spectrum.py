"""The power spectrum of data, by which a sampler knows which waves of a state are signal, and which noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from diffusion.by_frequency import ByFrequency, bands
from diffusion.cosine import dct, on_rows
from diffusion.mollifier import Mollifier

_LEAST = 1e-12  # power; less is none, and has no logarithm
_TAIL = 0.5  # the power law beyond the band is that of the frequencies from here on


@dataclass(frozen=True)
class Spectrum(ByFrequency):
    """c, the mean power of the cosine coefficients of x_0 on the training lattice, where white noise has 1.

    The frequencies are those of `Mollifier.frequencies`, up to 1, the finest wave along an axis of the training
    lattice. Beyond, c falls as frequency^-decay. On a lattice of r times the pixels both powers are r times as large.

    decay: 0 or more.
    """

    decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay is {self.decay}; accepted: a finite number, 0 or more")

    def at(self, frequency: torch.Tensor) -> torch.Tensor:
        """c at frequencies ≥ 0, float64 of their shape, on the CPU."""
        end = self.spacing * (len(self.values) - 1)
        beyond = (frequency.double().cpu() / max(end, self.spacing)).clamp(min=1)
        return super().at(frequency) * beyond**-self.decay


def measure_spectrum(batches: Iterable[torch.Tensor], mollifier: Mollifier) -> Spectrum:
    """The spectrum of images at the training resolution.

    Args:
        batches: images (B, C, H, W) in [−1, 1]; those with values that are not finite are left out.
        mollifier: that of the process.
    Raises:
        ValueError: when no image is finite, an image has another size, or as `require_functions`.
    """
    require_functions(mollifier)
    size, images = mollifier.train_size, 0
    power = torch.zeros(size, dtype=torch.float64)
    for batch in batches:
        if batch.ndim != 4 or tuple(batch.shape[-2:]) != tuple(size):
            raise ValueError(f"images are {tuple(batch.shape)}; accepted: (B, C, {size[0]}, {size[1]})")
        finite = batch[batch.isfinite().flatten(1).all(1)].double().cpu()
        power += on_rows(dct, dct(finite)).square().mean(1).sum(0)
        images += len(finite)
    if not images:
        raise ValueError("no image is finite; accepted: at least one, to measure the spectrum of the data")
    spacing, weights = bands(mollifier.frequencies(size), size)
    weights = weights[: int(1 / spacing + _LEAST) + 1]
    values = (weights @ power.flatten() / weights.sum(1) / images).clamp(min=_LEAST)
    frequency = spacing * torch.arange(len(values), dtype=torch.float64)
    return Spectrum(spacing, tuple(values.tolist()), _decay(frequency, values))


def _decay(frequency: torch.Tensor, values: torch.Tensor) -> float:
    """The exponent of the power law of least squares in logarithms; 0 where too few values are in the tail."""
    tail = frequency >= _TAIL
    if tail.sum() < 2:
        return 0.0
    x, y = frequency[tail].log(), values[tail].log()
    x = x - x.mean()
    return max(0.0, -float((x * y).sum() / x.square().sum()))


def require_functions(mollifier: Mollifier) -> None:
    """Raise ValueError unless states are the same functions on all lattices, wave by wave."""
    if mollifier.identity or mollifier.kind != "dct":
        raise ValueError(
            f"mollifier is {mollifier.kind!r} with sigma {mollifier.sigma:g}; accepted by a progressive sampler: 'dct' "
            "with sigma above 0, which makes states functions"
        )
