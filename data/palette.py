"""The colours of procedural landscapes, and the colour spaces in which they are mixed."""

import math

import torch

# Colours in OKLCH (lightness, chroma, hue in degrees), one row per mood; columns as in COLOURS.
COLOURS = ("sky_top", "sky_bottom", "sun", "glow", "lit", "shade", "water", "hill")
MOODS = (
    (
        (0.62, 0.13, 250),
        (0.93, 0.04, 225),
        (0.98, 0.08, 95),
        (0.97, 0.03, 95),
        (0.76, 0.04, 235),
        (0.56, 0.07, 250),
        (0.66, 0.11, 230),
        (0.64, 0.15, 135),
    ),  # day
    (
        (0.68, 0.10, 285),
        (0.91, 0.08, 60),
        (0.97, 0.06, 85),
        (0.94, 0.07, 65),
        (0.74, 0.10, 355),
        (0.55, 0.11, 315),
        (0.76, 0.08, 325),
        (0.46, 0.10, 300),
    ),  # dawn
    (
        (0.42, 0.14, 305),
        (0.80, 0.15, 52),
        (0.93, 0.13, 88),
        (0.82, 0.15, 60),
        (0.54, 0.15, 20),
        (0.37, 0.12, 345),
        (0.56, 0.14, 30),
        (0.28, 0.08, 330),
    ),  # sunset
    (
        (0.22, 0.07, 275),
        (0.48, 0.10, 260),
        (0.96, 0.03, 100),
        (0.66, 0.07, 250),
        (0.44, 0.07, 258),
        (0.29, 0.07, 270),
        (0.35, 0.08, 255),
        (0.20, 0.05, 265),
    ),  # night
    (
        (0.50, 0.09, 215),
        (0.90, 0.07, 165),
        (0.98, 0.05, 120),
        (0.93, 0.06, 150),
        (0.62, 0.07, 190),
        (0.45, 0.07, 210),
        (0.62, 0.09, 185),
        (0.38, 0.09, 165),
    ),  # mist
    (
        (0.74, 0.08, 205),
        (0.94, 0.07, 90),
        (0.98, 0.07, 95),
        (0.96, 0.07, 85),
        (0.74, 0.12, 60),
        (0.55, 0.13, 38),
        (0.68, 0.10, 195),
        (0.66, 0.13, 75),
    ),  # desert
)


def oklch(lightness: float, chroma: float, hue: torch.Tensor) -> torch.Tensor:
    """One colour per function, (B, 3, 1, 1), from hues (B, 1, 1, 1) in degrees."""
    hue = hue.flatten()
    lab = oklab(torch.full_like(hue, lightness), torch.full_like(hue, chroma), hue)
    return oklab_to_rgb(lab)[..., None, None]


def oklab(lightness: torch.Tensor, chroma: torch.Tensor, hue: torch.Tensor) -> torch.Tensor:
    """OKLab (..., 3) of lightness, chroma and hue in degrees."""
    angle = hue * (math.pi / 180)
    return torch.stack([lightness, chroma * angle.cos(), chroma * angle.sin()], -1)


def oklab_to_rgb(lab: torch.Tensor) -> torch.Tensor:
    """OKLab (..., 3) as gamma-encoded sRGB, clipped to the gamut (B. Ottosson, 2020)."""
    to_cone = torch.tensor(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_linear = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ to_cone.T) ** 3 @ to_linear.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)
