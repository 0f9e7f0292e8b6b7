"""Images at the border of the API: what users hold becomes what networks take, and results become pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from data.decoding import with_channels
from data.pixels import to_float, to_pictures
from diffusion.conditioning import check_mask
from diffusion.coordinates import Size

OneImage: TypeAlias = torch.Tensor | np.ndarray | Image.Image
Images: TypeAlias = OneImage | Sequence[OneImage]

_ACCEPTED = "accepted: floats in [−1, 1], uint8 from 0 to 255, or PIL images"
_LARGEST = 8.0  # of a float; filters overshoot [−1, 1] and results reach 4, but values up to 255 are a mistake


def as_images(
    images: Images,
    channels: int,
    device: torch.device,
    where: torch.Tensor | None = None,
    unknown: bool = False,
) -> torch.Tensor:
    """Images in the form that networks take: float32 (B, C, H, W) on a device, uint8 mapped to [−1, 1].

    Args:
        images: a tensor or array (B, C, H, W) or (C, H, W), a PIL image, or a sequence of images of one size. Floats of
            any precision are taken as they are; gradients are followed.
        channels: C. PIL images are converted to it.
        where: bool (H, W), the known pixels, which alone are checked; all by default.
        unknown: whether NaN is accepted, for values that are not known.
    Raises:
        ValueError: another type or shape, no image, values that are not finite or far outside [−1, 1].
    """
    if isinstance(images, list | tuple):
        parts = [as_images(image, channels, device, where, unknown) for image in images]
        sizes = {tuple(part.shape[-2:]) for part in parts}
        if len(sizes) != 1:
            raise ValueError(f"images have sizes {sorted(sizes)}; accepted: one size for all, and at least one image")
        return torch.cat(parts)
    x = _tensor(images, channels)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(f"images have shape {tuple(x.shape)}; accepted: (B, {channels}, H, W) or ({channels}, H, W)")
    x = x.to(device)
    if x.dtype == torch.uint8:
        x = to_float(x)
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}; {_ACCEPTED}")
    checked = x.detach()
    if where is not None:
        check_mask(where, tuple(x.shape[-2:]))
        checked = torch.where(where.to(device), checked, 0)
    if unknown:
        checked = checked.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    largest = float(checked.abs().amax())
    if not largest <= _LARGEST:
        raise ValueError(f"images reach {largest:g}; {_ACCEPTED}")
    return x.float()


def _tensor(image: OneImage, channels: int) -> torch.Tensor:
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(with_channels(ImageOps.exif_transpose(image), channels)))
        return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
    if isinstance(image, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(image))
    if isinstance(image, torch.Tensor):
        return image
    raise ValueError(f"images are {type(image).__name__}; {_ACCEPTED}")


def as_size(size: int | Sequence[int]) -> Size:
    """A size (H, W): 64 stands for (64, 64).

    Raises:
        ValueError: for anything but one or two whole numbers above 0.
    """
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"size is {size!r}; accepted: a side in pixels, 64, or (height, width)")
    return sides[0], sides[1]


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Pictures of results: floats (B, C, H, W) or (C, H, W), clamped to [−1, 1], or uint8."""
    return to_pictures((images[None] if images.ndim == 3 else images).detach())
