"""Noise that is one function at every resolution.

White noise is drawn as its cosine coefficients, each from its own place in a random stream. Two resolutions then share
the coefficients of the frequencies they have in common. Mollification removes the others: what is left are samples of
one and the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion.coordinates import Size
from diffusion.cosine import idct, on_rows
from diffusion.random import Key, normals


def function_noise(keys: Sequence[Key], channels: int, size: Size, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw white noise whose low frequencies do not depend on the resolution.

    Coefficient (k, l) of the orthonormal DCT-II is standard normal, a function of the key, the channel, k and l alone.
    The result is standard normal white noise: the transform is orthogonal. Drawing costs H·W at any (H, W).

    Args:
        keys: one a field, from `diffusion.random.key`.
        channels: C.
        size: (H, W).
        device: to compute on; the noise is the same on all, up to rounding.
    Returns:
        (B, C, H, W), float32.
    """
    return on_rows(idct, idct(normals(keys, channels, size, device))).contiguous()
