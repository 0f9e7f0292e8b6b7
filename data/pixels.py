"""The one place where stored 8-bit pixels become the floats in [-1, 1] of the model, and back, and then pictures."""

from __future__ import annotations

import torch
from PIL import Image


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Stored pixels as function values: x = u / 127.5 - 1.

    Args:
        images: uint8 of any shape.

    Returns:
        float32 of the same shape in [-1, 1]; 0 becomes -1 and 255 becomes 1 exactly.

    Raises:
        ValueError: the tensor is not uint8 (it may have been converted before).
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images: dtype {images.dtype}; accepted: torch.uint8")
    return images.to(torch.float32) / 127.5 - 1.0


def as_values(items: torch.Tensor) -> torch.Tensor:
    """Items of any data set as function values: stored pixels by :func:`to_float`, fields as they are."""
    return items if items.is_floating_point() else to_float(items)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Function values as stored pixels: u = round(127.5 (x + 1)), clamped to 0..255; inverse of :func:`to_float`.

    Args:
        images: floating point of any shape; values outside [-1, 1] are clamped, half precision is widened first.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: the tensor is not floating point.
    """
    if not images.is_floating_point():
        raise ValueError(f"images: dtype {images.dtype}; accepted: floating point values in [-1, 1]")
    return images.to(torch.float32).add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Images as Pillow has them: greyscale, RGB or RGBA.

    Args:
        images: (N, C, H, W), uint8 or floating point as :func:`to_uint8` takes it. Of other numbers of channels than
            1, 3 and 4, those of fields, each is a grey picture, beside the one before; what is not known is grey.
    """
    if images.is_floating_point():
        images = images.nan_to_num()
    if images.shape[1] not in (1, 3, 4):
        images = torch.cat(images.split(1, dim=1), dim=3)
    pixels = (images if images.dtype == torch.uint8 else to_uint8(images)).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image[..., 0] if image.shape[2] == 1 else image) for image in pixels]
