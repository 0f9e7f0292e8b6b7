"""What users give to the editing commands: images and masks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageFilter

from configs.schema import DataConfig
from data.datasets import open_dataset
from data.decoding import Decoder, fitted
from data.names import is_image_name
from data.pixels import to_float
from data.sources import FileSource, ImageSource, open_source
from diffusion.coordinates import Size
from metrics.resize import by

MASK = "white in the hole and black elsewhere, or transparent in the hole"
_BLACK, _WHITE = 48, 207  # what compression makes of black and white
_OUTLINE = 7  # pixels: width of the window in which an outline has black and white
_MOST_GREYS, _MOST_ELSEWHERE = 0.25, 0.02  # fractions of a mask


@dataclass(frozen=True)
class Inputs:
    """Images (N, C, H, W) in [−1, 1], where each comes from, and its size before it was fitted to (H, W).

    total: how many images there are; these are the first.
    """

    images: torch.Tensor
    names: list[str]
    own_sizes: list[Size]
    total: int

    def stem(self, i: int) -> str:
        """A file name for what is made of image i: its number and the last part of its name."""
        return f"{i:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '-', PurePosixPath(self.names[i]).stem)}"


def open_inputs(path: str | None, data: DataConfig, size: Size, count: int, split: str = "val") -> Inputs:
    """The first images of a file, folder, zip or tar, or without one of a split of the data set.

    Args:
        path: an image, or a folder, zip or tar of images of any sizes; None for the data set.
        data: of the model; its channels count in any case.
        size: (H, W) that images are cropped centrally and reduced to.
        count: at most so many.
        split: of the data set.
    Raises:
        ValueError: nothing there, no image, an image that cannot be decoded or is smaller than `size`.
    """
    if path is None:
        # A few images are wanted: the whole set need not be decoded for them.
        dataset = open_dataset(replace(data, img_size=size[0], img_width=size[1], in_memory="never"), split)
        indices = range(min(count, len(dataset)))
        images = torch.stack([dataset[i] for i in indices])
        return Inputs(to_float(images), [dataset.item_name(i) for i in indices], [size] * len(images), len(dataset))
    source = _open_source(path)
    decoded = Decoder(source, data.channels)
    images, sizes = [], []
    for i in range(min(count, len(source.names))):
        try:
            image = decoded(i)
        except ValueError as error:
            raise ValueError(f"--input is {path}: {source.names[i]} {error}; accepted: undamaged images") from error
        try:
            fit = torch.from_numpy(np.array(fitted(image, size)))
        except ValueError as error:
            raise ValueError(
                f"--input is {path}: {source.names[i]} {error}; accepted: that, or a smaller size"
            ) from error
        images.append(fit[None] if data.channels == 1 else fit.permute(2, 0, 1))
        sizes.append(image.size[::-1])
    return Inputs(to_float(torch.stack(images)), source.names[: len(images)], sizes, len(source.names))


def _open_source(path: str) -> ImageSource:
    where = Path(path).expanduser()
    if not path or not where.exists():
        raise ValueError(f"--input is {path}: nothing there; accepted: an image, or a folder, zip or tar of images")
    if where.is_dir() or (where.is_file() and not is_image_name(where.name)):
        return open_source(where, "--input")
    return FileSource(where)


def read_mask(path: str, own_size: Size, size: Size) -> torch.Tensor:
    """The known pixels, bool (H, W), by a mask: an image that is white in the hole, or transparent there.

    Where the opacity of the image varies, the hole is where it is below one half, whatever the colours are. Else the
    image must be black and white, and the hole is what is white. The mask is cropped and reduced as its image was; a
    pixel that lies in the hole by any part is unknown.

    Args:
        path: an image file, of the size of the image it belongs to.
        own_size: that size.
        size: (H, W) that the image was fitted to.
    Raises:
        ValueError: no such file, not an image, of another size, or neither transparent nor black and white; says which.
    """
    try:
        mask = Decoder(FileSource(Path(path).expanduser()), 4)(0)
    except ValueError as error:
        raise ValueError(f"--mask is {path}: {error}; accepted: an image, {MASK}") from None
    if mask.size[::-1] != tuple(own_size):
        raise ValueError(f"--mask is {path}: {_shown(mask.size[::-1])}; accepted: {_shown(own_size)}, as its image")
    opacity, grey = mask.getchannel("A"), mask.convert("RGB").convert("L")
    varies = opacity.getextrema()[0] != opacity.getextrema()[1]
    if not varies and (share := _greys(grey)) > 0:
        raise ValueError(f"--mask is {path}: {share:.0%} of it is neither black nor white; accepted: an image, {MASK}")
    hole = opacity.point(lambda value: 255 * (value < 128)) if varies else grey.point(lambda value: 255 * (value > 127))
    return torch.from_numpy(np.array(fitted(hole, size, Image.Resampling.BOX))) == 0


def _greys(image: Image.Image) -> float:
    """The fraction of a mask that is grey, 0 where that is no more than compression and smooth outlines leave.

    They leave greys between black and white alone, and few. A picture has greys elsewhere too.
    """
    grey = image.point(lambda value: 255 * (_BLACK < value < _WHITE))
    outline = (np.asarray(image.filter(ImageFilter.MinFilter(_OUTLINE))) <= _BLACK) & (
        np.asarray(image.filter(ImageFilter.MaxFilter(_OUTLINE))) >= _WHITE
    )
    greys = np.asarray(grey) > 0
    share, elsewhere = float(greys.mean()), float((greys & ~outline).mean())
    return share if share > _MOST_GREYS or elsewhere > _MOST_ELSEWHERE else 0.0


def _shown(size: Size) -> str:
    return f"{by(size)} (HxW)"
