"""Which images are for training and which for validation, by their names alone.

A split is a pair of increasing positions, {"train": […], "val": […]}.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

Split = dict[str, list[int]]


def place(name: str, purpose: str) -> float:
    """A number in [0, 1) that follows from a name and a purpose alone, the same everywhere: a hash, BLAKE2b."""
    key = name.encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(key, digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # as many bits as a float holds


def hashed_split(
    names: Sequence[str], part: float, purpose: str = "validation", good: Callable[[int], bool] = lambda i: True
) -> Split:
    """Hold out each image whose `place` is below `part`: it stays on its side whatever other images there are.

    Of two good images or more at least one is on either side, if need be the first or the last in the order of places.
    With part = 0, or fewer good images, none is held out.

    Args:
        names: of the images.
        part: about which part is held out, from 0 to below 1.
        purpose: splits for different purposes are independent.
        good: whether the image at a position can be used; asked of few.
    """
    places = [place(name, purpose) for name in names]
    order = sorted(range(len(names)), key=places.__getitem__)
    return _first_held_out(order, sum(value < part for value in places), part, good)


def tail_split(count: int, part: float, good: Callable[[int], bool] = lambda i: True) -> Split:
    """Keep the first ⌊(1 − part)·count⌋ images, as the authors' code does; for few good ones as `hashed_split`."""
    return _first_held_out(range(count)[::-1], count - int(count * (1 - part)), part, good)


def _first_held_out(order: Sequence[int], count: int, part: float, good: Callable[[int], bool]) -> Split:
    """Hold out `count` positions at the beginning of an order, so that a good one is on either side."""
    first = next((i for i, position in enumerate(order) if good(position)), 0) if part else 0
    last = next((i for i in range(len(order) - 1, first, -1) if good(order[i])), first) if part else first
    count = min(max(count, first + 1), last) if first < last else 0
    return {"train": sorted(order[count:]), "val": sorted(order[:count])}


def number_split(names: Sequence[str], first_validation: int) -> Split | None:
    """Positions by image number, or None if one side would be empty."""
    found = [image_number(name) for name in names]
    numbers = list(range(len(names))) if None in found else [n for n in found if n is not None]
    split = {
        "train": [i for i, n in enumerate(numbers) if n < first_validation],
        "val": [i for i, n in enumerate(numbers) if n >= first_validation],
    }
    return split if split["train"] and split["val"] else None


def image_number(name: str) -> int | None:
    """The last number in a file's name without its extension: "00000/img00000017.png" -> 17."""
    digits = re.findall(r"\d+", PurePosixPath(name).stem)
    return int(digits[-1]) if digits else None
