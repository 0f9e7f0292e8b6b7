"""Monte-Carlo points: the random pixels at which functions are seen in training, eq. (10)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from diffusion.coordinates import Points, Size

PointSequence = Callable[[int], torch.Tensor]
_TILE = 8


def draw_points(
    kind: str,
    generator: torch.Generator,
    batch: int,
    size: Size,
    count: int,
    device: torch.device | str,
    rows: slice = slice(None),
    known: torch.Tensor | None = None,
) -> Points:
    """Draw `count` distinct pixels for each of `batch` functions at once, without waiting for the device.

    kind: a name in `DRAWS`. "uniform" draws without replacement. "halton" and "sobol" take the first distinct pixels of
        a low-discrepancy sequence, which is shifted at random, on the torus, for each function. In all of them every
        pixel is equally likely.
    generator: on `device`. size: (H, W), the resolution. rows: the functions wanted; their points do not depend on it.
    known: bool (rows, H, W), the pixels of these that may be drawn, at least `count` of each; all by default.
    Returns Points with ids (B, count) of these, in the order of 8 × 8 tiles: points near in the list are near in the
    image, so that their neighbours are in the cache. Raises ValueError for an unknown kind and a count outside 1 … H·W.
    Source: eq. (10) and section 4.2.
    """
    pixels = size[0] * size[1]
    if kind not in DRAWS:
        raise ValueError(f"kind of draw is {kind!r}; accepted: {', '.join(DRAWS)}")
    if not 1 <= count <= pixels:
        raise ValueError(f"count is {count}; accepted: 1 to {pixels}, the pixels of {size[0]}x{size[1]}")
    device = torch.device(device)
    # With 62 random bits there are no ties, so that the draw is uniform however the smallest keys are found.
    keys = torch.randint(1 << 62, (batch, pixels), generator=generator, device=device)[rows]
    order, place = _tile_order(size, device)
    sequence = DRAWS[kind]
    if sequence is not None:
        shift = torch.rand(batch, 1, 2, generator=generator, device=device, dtype=torch.float64)[rows]
        keys = _first_visits(_sequence(sequence, 2 * count, device), shift, keys, place, size)
    if known is not None:
        keys = keys.masked_fill(~known.flatten(1)[:, order], torch.iinfo(keys.dtype).max)
    return Points(size, order[_smallest(keys, count)])


@lru_cache(maxsize=16)
def _tile_order(size: Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of all pixels, tile by tile and row-major within and among tiles, and the place of each id in that order."""
    ids = torch.arange(size[0] * size[1])
    row, col = ids // size[1], ids % size[1]
    tile = row // _TILE * (size[1] // _TILE + 1) + col // _TILE
    order = tile.argsort(stable=True)
    return order.to(device), order.argsort().to(device)


def _smallest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` smallest keys of each row, ascending."""
    if keys.device.type == "cpu":  # NumPy's vectorised selection and sort take a fifth of the time of torch's on CPUs
        chosen = np.argpartition(keys.numpy(), count - 1, axis=1)[:, :count]
        return torch.from_numpy(np.sort(chosen, axis=1))
    return keys.topk(count, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


def _first_visits(
    sequence: torch.Tensor, shift: torch.Tensor, keys: torch.Tensor, place: torch.Tensor, size: Size
) -> torch.Tensor:
    """Replace the key of each pixel, which is at its place of the order, by the time the shifted sequence visits it.

    sequence: float64 (L, 2) in [0, 1)². shift: float64 (B, 1, 2) in [0, 1). Pixels that it does not visit keep their
    random key, which exceeds any time: they come last, in random order, so that any number of distinct pixels can be
    taken.
    """
    batch, length = keys.shape[0], len(sequence)
    position = (sequence + shift).frac()  # (B, L, 2)
    # A position just below 1 may round to row H or column W.
    row, col = ((position[..., axis] * n).long().clamp(max=n - 1) for axis, n in enumerate(size))
    visited = place[row * size[1] + col]  # (B, L)
    times = torch.arange(length, device=keys.device).expand(batch, -1)
    return (keys + length).scatter_reduce(1, visited, times, "amin")


@lru_cache(maxsize=8)
def _sequence(points: PointSequence, length: int, device: torch.device) -> torch.Tensor:
    """The first points of a low-discrepancy sequence on a device, copied there once."""
    return points(length).to(device)


def _sobol(length: int) -> torch.Tensor:
    return torch.quasirandom.SobolEngine(2).draw(length, dtype=torch.float64)


def _halton(length: int) -> torch.Tensor:
    return torch.stack([_radical_inverse(length, base) for base in (2, 3)], dim=1)


def _radical_inverse(length: int, base: int) -> torch.Tensor:
    """0 … length-1 with their digits in `base` mirrored at the point, float64: one axis of the Halton sequence."""
    remaining = torch.arange(length)
    inverse = torch.zeros(length, dtype=torch.float64)
    weight = 1.0
    while bool(remaining.any()):
        weight /= base
        inverse += weight * (remaining % base)
        remaining = remaining // base
    return inverse


# The first points of each low-discrepancy sequence in [0, 1)², float64 (length, 2); None for independent pixels.
DRAWS: dict[str, PointSequence | None] = {"uniform": None, "halton": _halton, "sobol": _sobol}
