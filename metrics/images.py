"""Sets of 8-bit images of any size, as metrics take them: folders, zips, data sets, mollified samples."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from configs.schema import ImageConfig
from data.base import CHANNELS, digest
from data.datasets import open_dataset
from data.decoding import Decoder, one_line, with_channels
from data.opening import check_regular, open_regular, size_and_end
from data.sources import FolderSource, existing_path, open_source, stored_bytes
from diffusion.coordinates import Size
from diffusion.mollifier import Mollifier
from diffusion.random import Purpose, numpy_stream
from metrics.drawn import AGAIN, drawn
from runtime.claimed import RAW, SHEETS, whole_png
from runtime.files import file_digest


class ImageSet(Protocol):
    """Images in a fixed order; readable from threads."""

    path: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray:
        """Image i, uint8 (H, W, C)."""

    def sizes(self) -> Counter[Size]:
        """How many images there are of each size (H, W)."""

    def item_name(self, i: int) -> str:
        """Where image i comes from, for people."""

    def fingerprint(self) -> str:
        """Hex digest of what the images are."""


class ImageFolder:
    """The images of a folder, zip or tar, sorted by name, at their own sizes.

    Of a folder of samples (one with their manifest.json), in an archive too, only those are taken; other pictures in it
    are counted. `manifest` is what it holds, where there is one.
    """

    def __init__(self, path: str, channels: int, field: str, limit: int | None = None) -> None:
        """
        Args:
            path: folder, zip or tar.
            channels: of the images given out, whatever is stored.
            field: what a user calls this path, for messages.
            limit: take the first so many.
        Raises:
            ValueError: when there is nothing, no image, or fewer than `limit`.
        """
        self._source, self.path, self._channels, self._field = open_source(path, field), str(path), channels, field
        self._decoder = Decoder(self._source, channels)
        pictures = [i for i, name in enumerate(self._source.names) if Path(name).name not in SHEETS]
        own = drawn(self._source, pictures, field)
        self._texts, self.manifest = own.texts, own.manifest
        self._indices = _first(list(own.texts), limit, path)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> np.ndarray:
        index = self._indices[i]
        try:
            if self._texts[index] is not None and whole_png(stored_bytes(self._source, index)) is None:
                raise ValueError(f"is damaged; {AGAIN}")
            return _pixels(self._decoder(index))
        except ValueError as error:
            raise ValueError(f"{self._field}: {self.path}: {self.item_name(i)} {error}") from error

    def sizes(self) -> Counter[Size]:
        with ThreadPoolExecutor() as pool:
            return Counter(pool.map(self._size, range(len(self))))

    def _size(self, i: int) -> Size:
        try:
            return self._decoder.header(self._indices[i]).size[::-1]
        except ValueError as error:
            raise ValueError(f"{self._field}: {self.path}: {self.item_name(i)} {error}") from error

    def item_name(self, i: int) -> str:
        return self._source.names[self._indices[i]]

    def fingerprint(self) -> str:
        items = (f"{self._source.names[i]} {self._source.signature(i)}" for i in self._indices)
        return digest({"channels": self._channels}, items)


class DatasetImages:
    """The images of a configuration's data set."""

    def __init__(self, config: ImageConfig, split: str, channels: int) -> None:
        self._dataset, self._channels = open_dataset(config.data, split), channels
        self.path = " ".join(filter(None, (f"data.name={config.data.name}", config.data.root_dir, f"split {split}")))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> np.ndarray:
        return _converted(self._dataset[i], self._channels)

    def sizes(self) -> Counter[Size]:
        return Counter({tuple(self._dataset.size): len(self)})

    def item_name(self, i: int) -> str:
        return self._dataset.item_name(i)

    def fingerprint(self) -> str:
        return digest({"channels": self._channels}, [self._dataset.fingerprint()])


class Mirrored:
    """Images turned left to right: all of them, or with a seed a random half."""

    def __init__(self, images: ImageSet, seed: int | None = None) -> None:
        self._images, self._seed = images, seed
        self.path = f"{images.path}, mirrored{'' if seed is None else ' at random'}"
        chance = None if seed is None else numpy_stream(seed, Purpose.MIRRORED_REFERENCE).random(len(images))
        self._turned = np.ones(len(images), bool) if chance is None else chance < 0.5

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> np.ndarray:
        pixels = self._images[i]
        return np.ascontiguousarray(pixels[:, ::-1]) if self._turned[i] else pixels

    def sizes(self) -> Counter[Size]:
        return self._images.sizes()

    def item_name(self, i: int) -> str:
        return f"{self._images.item_name(i)}{' mirrored' if self._turned[i] else ''}"

    def fingerprint(self) -> str:
        return digest({"mirrored": True, "seed": self._seed}, [self._images.fingerprint()])


class _Beside(FolderSource):
    """Chosen names of a folder, whether there are such files or not."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self.names = path, names


class MollifiedSamples:
    """Samples kept before the Wiener filter (`raw/*.npy` of a sample folder), filtered and cut to 8 bit.

    This is what the authors evaluate: they store samples as float16, and cut fractions off instead of rounding.
    """

    def __init__(self, path: str, mollifier: Mollifier, inv_snr: float, channels: int, limit: int | None) -> None:
        self.path, self._mollifier, self._inv_snr, self._channels = str(path), mollifier, inv_snr, channels
        folder = existing_path(path, "samples")
        files = sorted((folder / "raw").glob("*.npy"))
        if not files:
            raise ValueError(f"samples is {path}, which has no raw/*.npy; accepted: samples drawn with save_raw")
        own = drawn(_Beside(folder, [f"{file.stem}.png" for file in files]), range(len(files)), "samples")
        self.manifest = own.manifest
        self._files = _first([files[i] for i in own.texts], limit, path)
        self._digests = {files[i]: texts[RAW] for i, texts in own.texts.items() if texts and RAW in texts}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> np.ndarray:
        path = self._files[i]
        if path in self._digests and self._digests[path] != file_digest(path):
            raise ValueError(f"{path} is damaged: its checksum is another; {AGAIN}")
        x = torch.from_numpy(self._array(i).copy()).half().float()
        if self._mollifier.kind == "dct":
            x = self._mollifier.inverse(x, self._inv_snr)
        return _converted(((x + 1) / 2 * 255).clamp(0, 255).to(torch.uint8), self._channels)

    def _array(self, i: int) -> np.ndarray:
        """The stored sample (C, H, W), mapped, so that its size is checked against that of its file."""
        path, accepted = self._files[i], "accepted: whole files of floating-point images (C, H, W)"
        try:
            check_regular(path)
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header raises nearly anything
            raise ValueError(f"{path} cannot be read ({one_line(error)}); {accepted}") from None
        if (
            not isinstance(stored, np.ndarray)
            or stored.ndim != 3
            or stored.shape[0] not in CHANNELS
            or (not np.issubdtype(stored.dtype, np.floating))
        ):
            kind = f"{stored.dtype} {stored.shape}" if isinstance(stored, np.ndarray) else "several arrays"
            raise ValueError(f"{path} holds {kind}; {accepted}")
        return stored

    def sizes(self) -> Counter[Size]:
        return Counter(self._array(i).shape[1:] for i in range(len(self)))

    def item_name(self, i: int) -> str:
        return self._files[i].name

    def fingerprint(self) -> str:
        items = (f"{path.name} {size_and_end(open_regular(path))}" for path in self._files)
        return digest({"inv_snr": self._inv_snr}, items)


def config_digest(config: Any) -> str:
    """SHA-256 of a plain configuration, as hex."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _first(items: list, limit: int | None, path: str) -> list:
    if limit is not None and limit > len(items):
        raise ValueError(f"num_samples is {limit}; accepted: at most {len(items)}, as {path} holds")
    return items if limit is None else items[:limit]


def _converted(stored: torch.Tensor, channels: int) -> np.ndarray:
    """Uint8 (C, H, W) as (H, W, channels)."""
    values = stored.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)
    return _pixels(with_channels(image, channels))


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W, C) of an L, RGB or RGBA image."""
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
