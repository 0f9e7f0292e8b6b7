"""Noise that is one function on every lattice, and the seeds it is drawn from.

White noise on a lattice is drawn as its cosine coefficients, lowest frequencies first. Two lattices then share the
coefficients of the frequencies they have in common, so that after mollification, which removes the others, they hold
samples of one and the same function.
"""

from __future__ import annotations

import hashlib

import torch

from diffusion.coordinates import Size
from diffusion.cosine import idct, on_rows

# Normals are drawn in blocks of this size, so that a longer draw begins with the numbers of a shorter one.
_BLOCK = 1 << 14


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed for a generator, a fixed function of `parts`, for example (run seed, "step", 7)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def function_noise(generator: torch.Generator, channels: int, size: Size) -> torch.Tensor:
    """Draw white noise whose low frequencies do not depend on the lattice.

    Coefficient (k, l) of the orthonormal DCT-II is standard normal, taken from position s² + … of one sequence ordered
    by shells s = max(k, l). The result is standard normal white noise: the transform is orthogonal.

    Args:
        generator: on the device the noise is wanted on; a CPU one gives the same noise everywhere.
        channels: C.
        size: (H, W).
    Returns:
        (C, H, W), float32.
    """
    height, width = size
    device = generator.device
    k = torch.arange(height, device=device)[:, None]
    l = torch.arange(width, device=device)[None, :]  # noqa: E741 (the index of the formula)
    shell = torch.maximum(k, l)
    position = shell * shell + torch.where(k == shell, l, shell + 1 + k)  # (H, W)
    sequence = _normals(generator, channels * max(height, width) ** 2).view(-1, channels)
    coefficients = sequence[position].permute(2, 0, 1)  # (C, H, W)
    return on_rows(idct, idct(coefficients)).contiguous()


def _normals(generator: torch.Generator, count: int) -> torch.Tensor:
    blocks = [torch.randn(_BLOCK, generator=generator, device=generator.device) for _ in range(-(-count // _BLOCK))]
    return torch.cat(blocks)[:count]
