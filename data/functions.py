"""Procedural images that are functions on [0, 1]², evaluated at any lattice: the embedded data of the demo.

Each function is a small landscape: a sky with a glow around the sun, mountains, a lake, a near hill, sometimes a
cloud or a balloon. It has what a function-space model must get right: smooth shading (sky, glow), sharp edges
(mountains, sun) and texture finer than a coarse lattice can hold (ripples, furrows).

A lattice value is the average of the function over the pixel's cell, so that lattices of different
sizes see the same function without aliasing: linear shading, Gaussians and sinusoids are averaged in
closed form, and an edge covers a pixel as its tangent half-plane does. Coordinates are cell centres,
rows (y, downwards) first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from data.base import Keep, check_lattice, digest, keep_in_memory, own_memory
from data.cell_averages import Cells, ellipse, gaussian, half_plane, rounded_box, wave
from data.palette import COLOURS, MOODS, oklab, oklab_to_rgb, oklch
from data.pixels import to_uint8
from diffusion.random import Purpose, numpy_stream

FAMILY = "landscapes-2"  # changes whenever the same (seed, index) would name another function

_DRAWS = 64  # uniforms per function; the order in which `_landscape` takes them is part of the data
_PIXELS_PER_CHUNK = 1 << 16  # keeps the intermediate arrays of a batch in the processor's cache
_Colours = dict[str, torch.Tensor]  # each (B, 3, 1, 1), sRGB in [0, 1]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, the grey of PIL


class ProceduralFunctions:
    """A family of RGB functions on [0, 1]²; (seed, index) names one function at every resolution."""

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"data.seed is {seed}; accepted: integers >= 0")
        self.seed = seed

    def evaluate(self, index: int, size: tuple[int, int], channels: int = 3) -> torch.Tensor:
        """One function on a lattice.

        Args:
            index: which function, >= 0.
            size: lattice (H, W), any; a non-square lattice samples the same unit square.
            channels: 3 = RGB; 1 = its luminance; 4 = RGB and the opacity of all that stands before the sky.

        Returns:
            float32 (C, H, W) in [-1, 1], cell averages of the function.

        Raises:
            ValueError: index, size or channels out of range.
        """
        return self.evaluate_many([index], size, channels)[0]

    def evaluate_many(self, indices: Sequence[int], size: tuple[int, int], channels: int = 3) -> torch.Tensor:
        """Several functions on one lattice, (B, C, H, W); item b equals ``evaluate(indices[b], ...)``."""
        check_lattice(size, channels)
        if any(index < 0 for index in indices):
            raise ValueError(f"index is {min(indices)}; accepted: integers >= 0")
        draws = torch.from_numpy(np.stack([self._uniforms(index) for index in indices]))
        chunk = max(1, _PIXELS_PER_CHUNK // (size[0] * size[1]))
        return torch.cat([_with_channels(*_landscape(part, size), channels) for part in draws.split(chunk)])

    def _uniforms(self, index: int) -> np.ndarray:
        return numpy_stream(self.seed, Purpose.FUNCTION, index).random(_DRAWS, dtype=np.float64)


class _Draws:
    """Takes the uniforms of a batch of functions one column at a time; every value is (B, 1, 1, 1)."""

    def __init__(self, uniforms: torch.Tensor) -> None:
        self._columns = iter(uniforms.float()[..., None, None, None].unbind(1))

    def between(self, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * next(self._columns)

    def chance(self, probability: float) -> torch.Tensor:
        return (next(self._columns) < probability).float()


def _landscape(uniforms: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cell averages of the functions with the given uniforms: RGB (B, 3, H, W) and opacity (B, 1, H, W) in [0, 1]."""
    u = _Draws(uniforms)
    cells = Cells.of(size)
    colour = _palette(u)

    sun_y, sun_x, sun_r = u.between(0.14, 0.46), u.between(0.15, 0.85), u.between(0.07, 0.12)
    sky = colour["sky_top"] + (colour["sky_bottom"] - colour["sky_top"]) * (cells.y / 0.72)
    spread = u.between(0.14, 0.22)
    glow = gaussian(cells, sun_y, sun_x, spread, spread)  # (B, 1, H, W), as every field
    canvas = _Canvas(sky + 0.6 * glow * (colour["glow"] - sky))
    canvas.paint(ellipse(cells, sun_y, sun_x, sun_r, sun_r), colour["sun"])

    _cloud(canvas, u, cells, colour)

    shore = u.between(0.60, 0.72)
    for left, right, haze in ((0.08, 0.50, 0.35), (0.50, 0.92, 0.0)):
        _mountain(canvas, u, cells, u.between(left, right), shore, haze, colour)

    _lake(canvas, u, cells, shore, sun_x, colour)
    _balloon(canvas, u, cells, sun_x)
    _hill(canvas, u, cells, colour)
    return canvas.rgb.clamp(0, 1), canvas.opacity.clamp(0, 1)


class _Canvas:
    """RGB with layers painted over each other, and how much of the sky they hide."""

    def __init__(self, rgb: torch.Tensor) -> None:
        self.rgb = rgb  # (B, 3, H, W)
        self.opacity = torch.zeros_like(rgb[:, :1])

    def paint(self, cover: torch.Tensor, colour: torch.Tensor) -> None:
        self.rgb = self.rgb + cover * (colour - self.rgb)
        self.opacity = self.opacity + cover * (1.0 - self.opacity)


def _cloud(canvas: _Canvas, u: _Draws, cells: Cells, colour: _Colours) -> None:
    """Two translucent bars, one resting on the other, in half of the functions."""
    shown, cy, cx, r = u.chance(0.5), u.between(0.12, 0.32), u.between(0.15, 0.85), u.between(0.02, 0.028)
    lower = rounded_box(cells, cy, cx, 0.0, u.between(0.09, 0.14), r)
    upper = rounded_box(cells, cy - 1.6 * r, cx + u.between(-0.05, 0.05), 0.0, u.between(0.03, 0.06), r)
    canvas.paint(0.6 * shown * torch.maximum(lower, upper), 0.5 * (colour["sky_bottom"] + 1.0))


def _mountain(
    canvas: _Canvas, u: _Draws, cells: Cells, peak_x: torch.Tensor, shore: torch.Tensor, haze: float, colour: _Colours
) -> None:
    """A triangle from a peak down to the shore, its left face lit, its right face in shade."""
    peak_y, left, right = shore - u.between(0.18, 0.42), u.between(0.7, 1.5), u.between(0.7, 1.5)
    lit_side = half_plane(cells, cells.y - peak_y - left * (peak_x - cells.x), 1.0, left)
    dark_side = half_plane(cells, cells.y - peak_y - right * (cells.x - peak_x), 1.0, -right)
    ridge = u.between(-0.5, 0.2)
    shaded = half_plane(cells, cells.x - peak_x - ridge * (cells.y - peak_y), -ridge, 1.0)
    face = colour["lit"] + shaded * (colour["shade"] - colour["lit"])
    canvas.paint(lit_side * dark_side, face + haze * (colour["sky_bottom"] - face))


def _lake(canvas: _Canvas, u: _Draws, cells: Cells, shore: torch.Tensor, sun_x: torch.Tensor, colour: _Colours) -> None:
    """Water below the shore, rippled, with the reflection of the sun."""
    coarse = wave(cells, u.between(9, 13), u.between(-2, 2), u.between(0, 1))
    fine = wave(cells, u.between(34, 52), u.between(-7, 7), u.between(0, 1))
    deep = colour["water"] - 0.35 * (cells.y - 0.7) + 0.035 * coarse + 0.03 * fine
    breadth = u.between(0.05, 0.09)
    path = gaussian(cells, shore, sun_x, 3 * breadth, breadth) * (0.75 + 0.25 * coarse)
    water = deep + 0.6 * path * (colour["sun"] - deep)
    canvas.paint(half_plane(cells, cells.y - shore, 1.0, 0.0), water)


def _hill(canvas: _Canvas, u: _Draws, cells: Cells, colour: _Colours) -> None:
    """The near hill, with furrows and fine grass."""
    level, swell, turns, phase = u.between(0.80, 0.9), u.between(0.03, 0.09), u.between(0.4, 1.0), u.between(0, 1)
    angle = 2 * math.pi * (turns * cells.x + phase)
    edge = half_plane(cells, cells.y - level - swell * angle.sin(), 1.0, -swell * 2 * math.pi * turns * angle.cos())
    slant = u.between(-8, 8)
    furrows = wave(cells, u.between(6, 11), slant, u.between(0, 1))
    grass = wave(cells, u.between(-20, 20), u.between(60, 90), u.between(0, 1))
    canvas.paint(edge, colour["hill"] + 0.05 * furrows + 0.03 * grass)


def _balloon(canvas: _Canvas, u: _Draws, cells: Cells, sun_x: torch.Tensor) -> None:
    """A hot-air balloon in about a third of the functions: a striped ellipse over a rounded box."""
    shown, cy, r = u.chance(0.35), u.between(0.2, 0.42), u.between(0.075, 0.1)
    cx = 0.14 + (sun_x - 0.14 + u.between(0.29, 0.43)) % 0.72  # far from the sun, on either side
    hue, phase = u.between(0, 360), u.between(0, 1)
    dark, pale = oklch(0.62, 0.18, hue), oklch(0.93, 0.05, hue + 60)
    wood = oklch(0.4, 0.06, torch.full_like(hue, 50))
    stripes = 0.5 + 0.5 * wave(cells, 0.0, 1.25 / r, phase)
    canvas.paint(shown * rounded_box(cells, cy + 1.44 * r, cx, 0.1 * r, 0.14 * r, 0.1 * r), wood)
    canvas.paint(shown * ellipse(cells, cy, cx, 1.15 * r, r), dark + stripes * (pale - dark))


def _palette(u: _Draws) -> _Colours:
    """Colours (B, 3, 1, 1) of each function: a mood, mixed with the next one and turned a little in hue."""
    moods = torch.tensor(MOODS)  # (moods, colours, 3)
    place = u.between(0, len(MOODS)).flatten()
    first = place.long() % len(MOODS)
    part = place - place.floor()
    for _ in range(2):  # smooth steps towards the pure moods: mixtures are possible, clear colours frequent
        part = part * part * (3 - 2 * part)
    turn, light = u.between(-12, 12).flatten(), u.between(-0.03, 0.03).flatten()
    lightness, chroma, hue = moods.unbind(-1)  # (moods, colours)

    def mood(row: torch.Tensor) -> torch.Tensor:
        return oklab(lightness[row] + light[:, None], chroma[row], hue[row] + turn[:, None])  # (B, colours, 3)

    lab = torch.lerp(mood(first), mood((first + 1) % len(MOODS)), part[:, None, None])
    rgb = oklab_to_rgb(lab)[..., None, None]
    return {name: rgb[:, column] for column, name in enumerate(COLOURS)}


def _with_channels(rgb: torch.Tensor, opacity: torch.Tensor, channels: int) -> torch.Tensor:
    if channels == 1:
        values = (rgb * torch.tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    else:
        values = rgb if channels == 3 else torch.cat([rgb, opacity], 1)
    return 2 * values - 1


class FunctionImages:
    """Functions first, first+1, ... of a seed, evaluated on one lattice and rounded to 8 bits.

    Args:
        seed: family, as in `ProceduralFunctions`.
        count: number of items, >= 1.
        size: lattice (H, W).
        channels: 1, 3 or 4.
        first: index of the first function.
        split: part of the fingerprint.
        in_memory: "always", "never" (evaluate at every access), or "auto" = if all fit in `memory_gb`.
        memory_gb: limit in 10⁹ bytes.
        keep: where they are kept, and by whom filled.

    Raises:
        ValueError: an argument out of range.
    """

    name = "functions"

    def __init__(
        self,
        seed: int,
        count: int,
        size: tuple[int, int],
        channels: int = 3,
        *,
        first: int = 0,
        split: str = "all",
        in_memory: str = "auto",
        memory_gb: float = 8.0,
        keep: Keep = own_memory,
    ) -> None:
        check_lattice(size, channels)
        if count < 1:
            raise ValueError(f"data.num_images is {count}; accepted: integers >= 1")
        self.size, self.channels, self.first = (size[0], size[1]), channels, first
        self.functions = ProceduralFunctions(seed)
        self._count, self._split = count, split
        self.pixels: torch.Tensor | None = None
        if keep_in_memory(in_memory, memory_gb, count, channels, size):
            self.pixels = keep((count, channels, *size), self._evaluate_all)

    def _evaluate_all(self, pixels: torch.Tensor) -> None:
        for start in tqdm(range(0, self._count, 64), desc="evaluating functions", disable=None, leave=False):
            stop = min(start + 64, self._count)
            indices = range(self.first + start, self.first + stop)
            pixels[start:stop] = to_uint8(self.functions.evaluate_many(indices, self.size, self.channels))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < self._count:
            raise IndexError(f"image {i} of {self._count}")
        if self.pixels is not None:
            return self.pixels[i]
        return to_uint8(self.functions.evaluate(self.first + i, self.size, self.channels))

    def item_name(self, i: int) -> str:
        return f"function {self.first + i} of seed {self.functions.seed}"

    def fingerprint(self) -> str:
        return digest(
            {
                "name": self.name,
                "family": FAMILY,
                "seed": self.functions.seed,
                "first": self.first,
                "count": self._count,
                "size": self.size,
                "channels": self.channels,
                "split": self._split,
            },
            (),
        )
