"""What a data set is to the rest of the code, and the rules that all kinds of data sets share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

CHANNELS = (1, 3, 4)
MEMORY_MODES = ("auto", "always", "never")
Fill = Callable[[torch.Tensor], object]  # writes decoded images into a tensor
Keep = Callable[[tuple[int, ...], Fill], torch.Tensor]  # a uint8 tensor of this shape, filled


class ImageDataset(Protocol):
    """A finite, ordered set of images of one size.

    Attributes:
        name: kind of data, as in ``data.name``.
        channels: C; 1 grey, 3 RGB, 4 RGB and alpha.
        size: (H, W).
        pixels: every item, uint8 (N, C, H, W), when they are kept in memory; else None.
    """

    name: str
    channels: int
    size: tuple[int, int]

    @property
    def pixels(self) -> torch.Tensor | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> torch.Tensor:
        """Item i, uint8 (C, H, W)."""

    def item_name(self, i: int) -> str:
        """Where item i comes from, for people."""

    def fingerprint(self) -> str:
        """Hex digest of what the data is: items, size, channels and split, wherever it is stored."""


def check_lattice(size: tuple[int, int], channels: int) -> None:
    """Raises ValueError unless size = (H, W) is positive and the number of channels is supported."""
    if channels not in CHANNELS:
        raise ValueError(f"data.channels is {channels}; accepted: 1 (grey), 3 (RGB), 4 (RGB and alpha)")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"data.img_size, data.img_width are {tuple(size)}; accepted: positive (H, W)")


def keep_in_memory(mode: str, memory_gb: float, count: int, channels: int, size: tuple[int, int]) -> bool:
    """Whether `count` images of C·H·W bytes are kept decoded: `mode`, or with "auto" if within memory_gb·10⁹ bytes."""
    if mode not in MEMORY_MODES:
        raise ValueError(f"data.in_memory is {mode!r}; accepted: {', '.join(MEMORY_MODES)}")
    return mode == "always" or (mode == "auto" and count * channels * size[0] * size[1] <= memory_gb * 1e9)


def own_memory(shape: tuple[int, ...], fill: Fill) -> torch.Tensor:
    """A uint8 tensor in the memory of this process alone, filled."""
    pixels = torch.empty(shape, dtype=torch.uint8)
    fill(pixels)
    return pixels


def digest(description: dict, items: Iterable[str]) -> str:
    """SHA-256 over a JSON description and the items in order, as hex."""
    sha = hashlib.sha256(json.dumps(description, sort_keys=True, allow_nan=False).encode())
    for item in items:
        sha.update(b"\0" + item.encode("utf-8", "surrogateescape"))
    return sha.hexdigest()
