"""Any map-style data set as an `ImageDataset`: one of torchvision, of another library, or a class of your own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from data.base import check_lattice, digest
from data.decoding import fitted, in_memory, with_channels
from data.depth import Deep, White

_ACCEPTED = "accepted: a PIL image, or uint8 (C, H, W) or (H, W), alone or first in a tuple"


class MapStyle(Protocol):
    """What `torch.utils.data.Dataset` asks of a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


class WrappedImages:
    """The images of a map-style data set, cropped centrally and reduced to one size. Labels are left out.

    Args:
        items: item i is an image or a tuple that begins with one, such as (image, label). An image is a PIL image, or a
            uint8 tensor or array (C, H, W) or (H, W). Floats are refused, since data sets do not agree on their range:
            leave out torchvision's ToTensor.
        size: (H, W); that of the first image by default.
        channels: 1 grey, 3 RGB, 4 RGB and alpha.
    Raises:
        ValueError: an item that is no image, or one smaller than `size`; names the item.
    """

    name, pixels = "wrapped", None

    def __init__(self, items: MapStyle, size: tuple[int, int] | None = None, channels: int = 3) -> None:
        if len(items) == 0:
            raise ValueError("items are none; accepted: one image or more")
        self._items, self.channels = items, channels
        self._white = White("items", self._deep_items)
        check_lattice(size or (1, 1), channels)
        height, width = size or self._picture(0).size[::-1]
        self.size = height, width

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        try:
            pixels = torch.from_numpy(np.array(fitted(self._picture(i), self.size)))
        except ValueError as error:
            raise ValueError(f"item {i} {error}") from None
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1).contiguous()

    def _item(self, i: int) -> Any:
        item = self._items[i]
        return item[0] if isinstance(item, tuple | list) and item else item

    def _deep_items(self) -> Iterator[Deep]:
        for image in map(self._item, range(len(self))):
            deep = in_memory(image) if isinstance(image, Image.Image) else None
            if deep is not None:
                yield deep

    def _picture(self, i: int) -> Image.Image:
        image = self._item(i)
        if isinstance(image, Image.Image):
            return with_channels(ImageOps.exif_transpose(image), self.channels, self._white)
        values = image.numpy() if isinstance(image, torch.Tensor) else image
        if not isinstance(values, np.ndarray) or values.dtype != np.uint8:
            kind = getattr(values, "dtype", type(values).__name__)
            raise ValueError(f"item {i} is {kind}; {_ACCEPTED}")
        if values.ndim == 3 and values.shape[0] in (3, 4):
            values = np.ascontiguousarray(values.transpose(1, 2, 0))
        elif values.ndim == 3 and values.shape[0] == 1:
            values = values[0]
        if values.ndim != 2 and values.shape[-1] not in (3, 4):
            raise ValueError(f"item {i} has shape {values.shape}; {_ACCEPTED}")
        return with_channels(Image.fromarray(values), self.channels)

    def item_name(self, i: int) -> str:
        return f"{i:06d}"

    def fingerprint(self) -> str:
        """Reads every item: nothing else says what the data are."""
        items = (hashlib.sha256(self[i].numpy().data).hexdigest() for i in range(len(self)))
        return digest({"name": self.name, "size": self.size, "channels": self.channels}, items)
