"""Fashion-MNIST (Xiao et al., 2017; MIT licence): 28×28 grey photographs of garments, each with a black border of two
pixels around it, so that 32×32 is its own size.

It is read from an .npz file or from the published idx file, where torchvision keeps it too. Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from PIL import Image

from data.base import Keep, check_lattice, digest, own_memory
from data.decoding import fitted, one_line, with_channels
from data.opening import LARGEST, open_regular, read_at_most

SIDE, PADDED = 28, 32
IDX = "train-images-idx3-ubyte"
ACCEPTED = f"an .npz file of the images, or a folder with {IDX}, as that of torchvision's FashionMNIST"


def read_fashion_mnist(path: Path) -> np.ndarray:
    """The training images, uint8 (N, 28, 28), in published order.

    Args:
        path: an .npz file with the array `images` (others in it are ignored), or a folder with the published file, or
            in which torchvision.datasets.FashionMNIST keeps it.

    Raises:
        ValueError: nothing of the kind there, or arrays of another kind.
    """
    images = _of_idx(path) if path.is_dir() else _of_npz(path)
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or not len(images):
        raise ValueError(
            f"data.root_dir: {path} holds images of {images.dtype} {images.shape}; "
            f"accepted: uint8 (N, {SIDE}, {SIDE}) with N >= 1"
        )
    return images


def _of_npz(path: Path) -> np.ndarray:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            largest = max((member.file_size for member in archive.infolist()), default=0)
            if largest > LARGEST:
                raise OSError(f"an array of {largest} bytes; accepted: at most {LARGEST}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return arrays["images"]
    except KeyError:
        raise ValueError(f"data.root_dir: {path} has no array images; accepted: {ACCEPTED}") from None
    except Exception as error:  # damaged archives and headers of arrays raise nearly anything
        raise ValueError(f"data.root_dir: {path} cannot be read ({one_line(error)}); accepted: {ACCEPTED}") from error


def _of_idx(folder: Path) -> np.ndarray:
    """An idx file: 0, 0, 8 for uint8, the number of axes, then each length as four bytes, big-endian; then values."""
    files = [folder / below / (IDX + ending) for below in ("", "FashionMNIST/raw") for ending in ("", ".gz")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise ValueError(f"data.root_dir: {folder} holds no {IDX} or {IDX}.gz; accepted: {ACCEPTED}")
    try:
        with open_regular(path) as file:
            content = read_at_most(cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file)
        axes = np.frombuffer(content, ">u4", content[3], offset=4)
        if content[:3] != b"\0\0\x08":
            raise ValueError("another kind of file")
        return np.frombuffer(content, np.uint8, offset=4 + axes.nbytes).reshape(axes)
    except (OSError, ValueError, IndexError, EOFError, zlib.error) as error:
        raise ValueError(f"data.root_dir: {path} is damaged; accepted: an idx file of uint8 images") from error


class FashionImages:
    """Chosen images of Fashion-MNIST, padded to 32×32 and reduced to one size; always in memory.

    Args:
        images: uint8 (N, 28, 28).
        indices: which images, in the order wanted.
        size: (H, W) of the items, at most 32×32. As with other data, smaller ones are made by a central crop to the
            aspect ratio and an antialiased Lanczos filter.
        channels: 1 grey, 3 the same three times, 4 with an opacity of 1.
        split: name of the choice made by `indices`, part of the fingerprint.
        keep: where the items are kept, and by whom filled.

    Raises:
        ValueError: an argument out of range.
    """

    name = "fashion_mnist"

    def __init__(
        self,
        images: np.ndarray,
        indices: Sequence[int],
        size: tuple[int, int],
        channels: int,
        *,
        split: str = "all",
        keep: Keep = own_memory,
    ) -> None:
        check_lattice(size, channels)
        if max(size) > PADDED:
            raise ValueError(
                f"data.img_size, data.img_width: {tuple(size)}, accepted with data.name={self.name} are "
                f"sizes up to {PADDED}x{PADDED}"
            )
        self.size, self.channels = (size[0], size[1]), channels
        self._indices, self._split = list(indices), split
        shape = (len(self._indices), channels, *size)
        self.pixels = keep(shape, lambda pixels: pixels.copy_(self._padded(images)))

    def _padded(self, images: np.ndarray) -> torch.Tensor:
        """The items, uint8 (N, C, H, W)."""
        border = (PADDED - SIDE) // 2
        padded = np.pad(images[self._indices], ((0, 0), (border, border), (border, border)))
        if self.size == (PADDED, PADDED) and self.channels == 1:
            return torch.from_numpy(padded)[:, None]
        items = (np.asarray(with_channels(fitted(Image.fromarray(item), self.size), self.channels)) for item in padded)
        stacked = torch.from_numpy(np.stack(list(items)))  # (N, H, W) or (N, H, W, C)
        return stacked[:, None] if self.channels == 1 else stacked.permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self.pixels[i]

    def item_name(self, i: int) -> str:
        return index_name(self._indices[i])

    def fingerprint(self) -> str:
        description = {"name": self.name, "size": self.size, "channels": self.channels, "split": self._split}
        return digest(
            description, [hashlib.sha256(self.pixels.numpy().data).hexdigest(), *map(index_name, self._indices)]
        )


def index_name(index: int) -> str:
    """What an image is called, for people and for the split."""
    return f"{index:05d}"
