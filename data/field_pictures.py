"""Pictures of fields for people: a colour for each value, and beside each channel a bar that says which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data.units import FieldUnits

# Viridis, at eight places of equal distance: dark is low, and grey prints keep the order.
_COLOURS = np.array([(68, 1, 84), (70, 50, 127), (54, 92, 141), (39, 127, 142),
                     (31, 161, 135), (74, 194, 109), (159, 218, 58), (253, 231, 37)], dtype=float)  # fmt: skip
ORIGINS = ("upper", "lower")  # where row 0 of a field is drawn, as matplotlib calls it
_UNKNOWN = (190, 190, 190)
_READABLE = 192  # height of a small field, about
_MARGIN, _BAR, _TEXT, _LINE, _FONT = 8, 12, 76, 20, 13


def coloured(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Colours uint8 (..., 3) of values from `low` to `high`; what is beyond has those of the ends, NaN is grey."""
    known = np.isfinite(values)
    place = np.clip((np.where(known, values, low) - low) / max(high - low, 1e-300), 0, 1)
    steps = np.linspace(0, 1, len(_COLOURS))
    colours = np.stack([np.interp(place, steps, channel) for channel in _COLOURS.T], axis=-1)
    return np.where(known[..., None], colours.round(), _UNKNOWN).astype(np.uint8)


def field_picture(
    values: torch.Tensor,
    units: FieldUnits,
    limits: Sequence[tuple[float, float]] | None = None,
    origin: str = "upper",
) -> torch.Tensor:
    """A field (C, H, W) in the units of the data as a picture, uint8 (3, h, w): its channels beside each other.

    limits: the values at both ends of the bar of each channel; by default `units.common`, or without it `units.limits`,
    so that pictures of one model can be compared. origin: one of `ORIGINS`.
    """
    values = values.flip(1) if origin == "lower" else values
    limits = limits or units.common or units.limits
    channels, height, width = values.shape
    factor = max(1, round(_READABLE / max(height, width)))
    height, width = factor * height, factor * width
    column = width + 3 * _MARGIN + _BAR + _TEXT
    picture = Image.new("RGB", (channels * column + _MARGIN, height + 2 * _MARGIN + _LINE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
    for c, (array, (low, high), name) in enumerate(zip(values.double().cpu().numpy(), limits, units.names)):
        left = _MARGIN + c * column
        pixels = np.kron(coloured(array, low, high), np.ones((factor, factor, 1), dtype=np.uint8))
        picture.paste(Image.fromarray(pixels), (left, _MARGIN))
        draw.text((left, _MARGIN + height + 3), name, fill="black", font=font)
        left += width + _MARGIN
        ramp = np.repeat(np.linspace(high, low, height)[:, None], _BAR, axis=1)
        picture.paste(Image.fromarray(coloured(ramp, low, high)), (left, _MARGIN))
        for part, anchor in ((0.0, "la"), (0.5, "lm"), (1.0, "ls")):
            text, place = f"{high + part * (low - high):.4g}", (left + _BAR + 4, _MARGIN + part * height)
            draw.text(place, text, fill="black", font=font, anchor=anchor)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
