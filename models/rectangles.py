"""Rectangles of a lattice, and how a lattice is cut into such. Letters: B batch, C channels, H × W lattice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from diffusion.coordinates import Size


@dataclass(frozen=True)
class Rectangle:
    """Rows top to bottom and columns left to right of a lattice."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> Size:
        return self.bottom - self.top, self.right - self.left

    def grown(self, margin: Size, lattice: Size) -> Rectangle:
        """With `margin` rows and columns more on each side, as far as the lattice goes."""
        top, left = max(self.top - margin[0], 0), max(self.left - margin[1], 0)
        return Rectangle(top, min(self.bottom + margin[0], lattice[0]), left, min(self.right + margin[1], lattice[1]))

    def shrunk(self, margin: Size, lattice: Size) -> Rectangle:
        """Without the rows and columns within `margin` of an edge that is not the lattice's."""
        return Rectangle(
            self.top + margin[0] * (self.top > 0),
            self.bottom - margin[0] * (self.bottom < lattice[0]),
            self.left + margin[1] * (self.left > 0),
            self.right - margin[1] * (self.right < lattice[1]),
        )

    def cut(self, values: torch.Tensor, outer: Rectangle) -> torch.Tensor:
        """This window of features (B, points of `outer`, C): (B, points, C)."""
        if outer == self:
            return values
        image = values.unflatten(1, outer.size)
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return image[:, rows, self.left - outer.left : self.right - outer.left].flatten(1, 2)

    def ids(self, width: int, device: torch.device) -> torch.Tensor:
        """Of its pixels in a lattice of this width: int64 (points,)."""
        rows = torch.arange(self.top, self.bottom, device=device)
        cols = torch.arange(self.left, self.right, device=device)
        return (rows[:, None] * width + cols).flatten()


@lru_cache(maxsize=16)
def tiling(lattice: Size, margin: Size, budget: int) -> tuple[Rectangle, ...]:
    """Tiles, row by row, whose windows with this margin hold at most `budget` pixels, of the least pixels in all.

    Raises ValueError where even the window around a single pixel is larger.
    """
    choices = []
    for down in _parts(lattice[0]):
        for across in _parts(lattice[1]):
            tile = (-(-lattice[0] // down), -(-lattice[1] // across))
            window = [min(n + 2 * m, limit) for n, m, limit in zip(tile, margin, lattice)]
            if window[0] * window[1] <= budget:
                choices.append((down * across * window[0] * window[1], tile))
    if not choices:
        least = min(2 * margin[0] + 1, lattice[0]) * min(2 * margin[1] + 1, lattice[1])
        raise ValueError(
            f"model.tile_points is {budget}; accepted: {least} or more at {lattice[0]}x{lattice[1]} pixels"
        )
    rows, cols = min(choices)[1]
    return tuple(
        Rectangle(top, min(top + rows, lattice[0]), left, min(left + cols, lattice[1]))
        for top in range(0, lattice[0], rows)
        for left in range(0, lattice[1], cols)
    )


def _parts(n: int) -> list[int]:
    """Into how many tiles an axis of n pixels may be cut; of those that make tiles equally large, the fewest."""
    return sorted({-(-n // (-(-n // parts))) for parts in range(1, min(n, 256) + 1)} | {n})
