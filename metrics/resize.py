"""Image sizes that feature extractors take, by the rules of clean-fid (Parmar et al. 2022)."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

Size = tuple[int, int]


def by(size: Size) -> str:
    """(192, 320) -> "192x320"."""
    return f"{size[0]}x{size[1]}"


def clean_resize(image: np.ndarray, size: Size) -> np.ndarray:
    """Antialiased bicubic resize in floating point, as clean-fid's mode "clean".

    Args:
        image: (H, W, C), values 0 to 255.
        size: (h, w); at the image's own size the values stay as they are.
    Returns:
        (h, w, C) float32, 0 to 255, not rounded.
    """
    channels = [_resize_channel(image[..., c].astype(np.float32), size) for c in range(image.shape[2])]
    return np.stack(channels, axis=2)


def _resize_channel(channel: np.ndarray, size: Size) -> np.ndarray:
    resized = Image.fromarray(channel).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized).clip(0, 255)


def clip_resize(image: np.ndarray, side: int = 224) -> np.ndarray:
    """CLIP's own preprocessing: shorter side to `side` by antialiased bicubic in 8 bit, then the central square.

    Args:
        image: (H, W, 3) uint8.
    Returns:
        (side, side, 3) float32, whole numbers 0 to 255.
    """
    resized = transforms.resize(Image.fromarray(image), side, InterpolationMode.BICUBIC)
    return np.asarray(transforms.center_crop(resized, side)).astype(np.float32)
