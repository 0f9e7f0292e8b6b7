"""Sizes, seeds, steps and boxes as a command line writes them."""

import re

import torch

from configs.schema import MOST_SAMPLES, MOST_SEED, MOST_SIDE
from configs.validate import shown
from diffusion.coordinates import Size
from metrics.resize import by

_DIGITS = 18  # of numbers that are converted


def parse_size(text: str, flag: str = "sample_img_size") -> Size:
    """ "256" -> (256, 256); "192x320" -> (192, 320), height first; sides up to 65536.

    Raises:
        ValueError: for anything else, naming `flag`.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = [_number(side) for side in match.groups() if side] if match else [0]
    if not all(1 <= side <= MOST_SIDE for side in sides):
        raise ValueError(
            f"--{flag} is {shown(text)}; accepted: a side, 256, or height x width, 192x320, up to {MOST_SIDE}"
        )
    return sides[0], sides[-1]


def parse_seeds(text: str) -> list[int]:
    """ "0-99" or "3,7,10-12" -> ascending seeds without repetition.

    Raises:
        ValueError: for anything else.
    """
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (_number(match[1]), _number(match[2] or match[1])) if match else (0, -1)
        if not first <= last <= MOST_SEED:
            raise ValueError(
                f"--seeds is {shown(text)}; accepted: numbers and ranges up to {MOST_SEED}, e.g. 0-99 or 3,7,10-12"
            )
        if last - first >= MOST_SAMPLES - len(seeds):
            raise ValueError(f"--seeds is {shown(text)}; accepted: at most {MOST_SAMPLES} seeds")
        seeds.update(range(first, last + 1))
    return sorted(seeds)


def _number(digits: str) -> int:
    """A whole number, or one above every bound: Python does not convert thousands of digits."""
    significant = digits.lstrip("0")
    return int(significant or 0) if len(significant) <= _DIGITS else 10**_DIGITS


def parse_box(text: str, size: Size) -> torch.Tensor:
    """The known pixels, bool (H, W), outside a box "top,left,height,width" in pixels.

    Raises:
        ValueError: not four whole numbers, empty, or not within the image.
    """
    match = re.fullmatch(",".join([r"\s*(\d{1,9})\s*"] * 4), text)
    top, left, height, width = map(int, match.groups()) if match else (0, 0, 0, 0)
    if min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"--box is {shown(text)}; accepted: top,left,height,width of a box within {by(size)} (HxW)")
    known = torch.ones(size, dtype=torch.bool)
    known[top : top + height, left : left + width] = False
    return known


def parse_step(text: str | None, steps: int) -> int | None:
    """A step of the process: a whole number "300" from 0 to steps − 1, or a fraction "0.3" of the way there.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    if re.fullmatch(r"\d{1,9}", text) and int(text) < steps:
        return int(text)
    if re.fullmatch(r"\d*\.\d+", text) and float(text) <= 1:
        return round(float(text) * (steps - 1))
    raise ValueError(
        f"--start_step is {shown(text)}; accepted: 0 to {steps - 1}, or a fraction of the way there, 0.0 to 1.0"
    )
