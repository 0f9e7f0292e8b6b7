"""Random streams: each is a function of (seed, purpose, indices), and every bit of these counts.

PyTorch's CPU generator takes 32 bits of a seed, and NumPy's takes [0, 7] and [0, 7, 0] for the same. So generators are
not seeded anywhere else: here the key is hashed into as many bits as a generator holds (19937 of PyTorch's on a CPU,
64 of its CUDA generator, 128 of NumPy's). `normals` needs no generator: it computes any part of a field of numbers from
its key, on every device the same.
"""

from __future__ import annotations

import enum
import hashlib
import math
import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from diffusion.transfer import to_device

Key = tuple[int, int, int]  # 32 bits each


class Purpose(enum.Enum):
    """What a stream is for. No two places of the code share one; the indices that belong to it are in brackets."""

    WEIGHTS = "initial weights"
    STEP = (
        "times, points and noise of a training step [step, process]"  # process 0: all draw alike, for the whole batch
    )
    DROPOUT = "dropout of a training step [step, process]"  # likewise
    HELD_OUT_IMAGES = "times, points and noise of the held-out loss of images [batch]"
    HELD_OUT_LATENTS = "times and noise of the held-out loss of latents [batch]"
    ORDER = "order of the images of an epoch [epoch]"
    MIRRORED = "which images of an epoch are mirrored [epoch]"
    READERS = "base seed of decoding processes, which draw nothing"
    FUNCTION = "a procedural function [index]"
    IMAGE = "noise from which an image is drawn"
    IMAGE_STEP = "noise that a stochastic sampler adds to an image [step]"
    LATENT = "noise from which a latent is drawn and that its sampler adds [block of steps]"
    PATCH = "place of a patch in an image whose features are compared [image, patch]"
    MANIFOLD = "which features precision and recall look at"
    FLOOR = "how real images are halved for the floor of a metric"
    MIRRORED_REFERENCE = "which reference images are mirrored"
    RANDOM_FEATURES = "weights of the random network of features"
    COMPLETION = "values of fields where none is known [set, first field], and how these are distributed []"
    SELF_CHECK = "the example that a back end is checked with"
    BENCHMARK = "inputs of a benchmark [input]"


def stream(seed: int, purpose: Purpose, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` at the beginning of the stream (seed, purpose, indices), integers of any size."""
    generator = torch.Generator(device)
    if generator.device.type != "cpu":
        return generator.manual_seed(int.from_bytes(_digest(8, seed, purpose, indices), "little"))
    state = _template().clone()
    words = np.frombuffer(_digest(4 * _MERSENNE_WORDS, seed, purpose, indices), "<u4")
    state.numpy().view(np.uint64)[_MERSENNE_AT : _MERSENNE_AT + _MERSENNE_WORDS] = words
    return generator.set_state(state)


def seed_global(seed: int, purpose: Purpose, *indices: int, device: torch.device | str = "cpu") -> None:
    """Let PyTorch's global generators, of the CPU and of `device`, go on from the stream (seed, purpose, indices).

    Initial weights and dropout are drawn from them.
    """
    torch.set_rng_state(stream(seed, purpose, *indices).get_state())
    if torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(stream(seed, purpose, *indices, device=device).get_state(), device)


def numpy_stream(seed: int, purpose: Purpose, *indices: int) -> np.random.Generator:
    """NumPy's generator at the beginning of the stream (seed, purpose, indices)."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(_digest(16, seed, purpose, indices), "little")))


def key(seed: int, purpose: Purpose, *indices: int) -> Key:
    """The key of a field of `normals`: 96 bits of the digest of (seed, purpose, indices)."""
    words = np.frombuffer(_digest(12, seed, purpose, indices), "<u4")
    return tuple(words.tolist())


def _digest(length: int, seed: int, purpose: Purpose, indices: tuple[int, ...]) -> bytes:
    text = repr((operator.index(seed), purpose.value, *map(operator.index, indices)))
    return hashlib.shake_256(text.encode()).digest(length)


# Where PyTorch keeps the 624 words of its Mersenne twister, in words of 8 bytes: behind the seed and two counters.
_MERSENNE_AT, _MERSENNE_WORDS = 3, 624


@lru_cache(maxsize=1)
def _template() -> torch.Tensor:
    """The state of a generator about to make its first block of numbers from the words it holds."""
    return torch.Generator().manual_seed(0).get_state()


# Philox 4x32 with 10 rounds, as Salmon et al. 2011 define it: multipliers, and what is added to a key between rounds.
_MULTIPLIERS, _WEYL, _ROUNDS, _MASK = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10, 0xFFFFFFFF
_BLOCKS = {"cpu": 1 << 15, "cuda": 1 << 22}  # of four numbers, computed at once: what fits the cache, or the device


def normals(
    keys: Sequence[Key], channels: int, size: tuple[int, int], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Fields of independent standard normal numbers, one a key; number (c, k, l) does not depend on the field's size.

    Numbers 4j … 4j + 3 of a row are Philox 4x32-10 (Salmon et al. 2011) of the counter (j, k, c, third word of the
    key), made normal by Box and Muller. The integers are the same on all devices, and the numbers up to the rounding of
    logarithm and cosine. Costs B·C·H·W, and nothing is copied but the keys.

    Args:
        keys: B of them.
        channels: C.
        size: (H, W).
        device: to compute on.
    Returns:
        (B, C, H, W), float32.
    """
    device, (height, width) = torch.device(device), size
    schedule = [[_round_keys(k) for k in keys], [[k[2]] for k in keys]]
    rounds, last = (to_device(torch.tensor(words), device) for words in schedule)
    pairs = rounds[..., None, None, None].unbind(1)
    round_keys = [(pair[:, 0], pair[:, 1]) for pair in pairs]  # each (B, 1, 1, 1)
    blocks = -(-width // 4)
    column = torch.arange(blocks, device=device)[None, None, None, :]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    out = torch.empty(len(keys), channels, height, blocks, 4, device=device)
    at_once = max(1, _BLOCKS.get(device.type, 1 << 15) // (len(keys) * channels * blocks))
    for top in range(0, height, at_once):
        row = torch.arange(top, min(top + at_once, height), device=device)[None, None, :, None]
        bits = _philox((column, row, channel, last[:, :, None, None]), round_keys)
        rows = out[:, :, top : top + at_once]
        for i in (0, 2):
            radius = (bits[i].float() + 0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
            angle = bits[i + 1].float().mul_(2 * math.pi * 2.0**-32)
            torch.mul(radius, angle.cos(), out=rows[..., i])
            torch.mul(radius, angle.sin(), out=rows[..., i + 1])
    return out.flatten(-2)[..., :width]


def _philox(
    counter: tuple[torch.Tensor, ...], round_keys: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, ...]:
    """Four words of 32 bits, int64 of the broadcast shape, from a counter of four and the keys of all rounds."""
    c0, c1, c2, c3 = counter
    for k0, k1 in round_keys:
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 may hold more than their 32 bits, and shifts keep the sign: the mask drops both.
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1, ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0
    return torch.broadcast_tensors(c0, c1 & _MASK, c2, c3 & _MASK)


def _round_keys(k: Key) -> list[list[int]]:
    return [[(word + i * weyl) & _MASK for word, weyl in zip(k, _WEYL)] for i in range(_ROUNDS)]
