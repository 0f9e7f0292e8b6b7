"""Positive numbers that depend on the length of a frequency alone (see `Mollifier.frequencies`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffusion.coordinates import Size

_FINEST_SPACING = 1 / 32


@dataclass(frozen=True)
class ByFrequency:
    """Numbers above 0 at the frequencies 0, spacing, 2 · spacing, …; between them their logarithms are linear.

    spacing: above 0.
    values: the numbers; beyond the last it stays as it is.
    """

    spacing: float
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 < self.spacing < math.inf:
            raise ValueError(f"spacing is {self.spacing}; accepted: a finite number above 0")
        if not self.values or not all(0 < value < math.inf for value in self.values):
            raise ValueError(f"values are {self.values}; accepted: finite numbers above 0, at least one")

    def at(self, frequency: torch.Tensor) -> torch.Tensor:
        """The numbers at frequencies ≥ 0, float64 of their shape, on the CPU."""
        logs = torch.tensor([*self.values, self.values[-1]], dtype=torch.float64).log()
        position = (frequency.double().cpu() / self.spacing).clamp(max=len(self.values) - 1)
        below = position.floor().long()
        return torch.lerp(logs[below], logs[below + 1], position - below).exp()


def bands(frequency: torch.Tensor, size: Size) -> tuple[float, torch.Tensor]:
    """The spacing of values that a lattice tells apart, and how much each of its modes counts in each value.

    Each mode counts in the two values beside it, the nearer the more.

    Args:
        frequency: of the modes, float64 (H, W).
        size: (H, W).
    Returns:
        The spacing, and float64 (values, H·W).
    """
    spacing = max(2 / min(size), _FINEST_SPACING)
    position = frequency.flatten() / spacing
    numbers = torch.arange(int(position.max()) + 1, dtype=torch.float64)
    return spacing, (1 - (position - numbers[:, None]).abs()).clamp(min=0)
