"""A folder or a zip of encoded images as a data set of one size.

Two kinds of faults are told apart, the same way whether images are kept in memory or decoded on the fly:

* Seen in the header, when the set is opened: not an image, or smaller than the lattice (upscaling would
  invent detail). ``on_error="raise"`` refuses the set; ``"skip"`` drops these images, so the set is shorter.
* Seen when decoding: truncated or damaged pixels. ``"raise"`` raises, at opening if images are kept in memory
  and else when the image is reached; ``"skip"`` puts the next good image in order (cyclically) in its place.

Both log a warning that names the image (of many bad headers, the first ones and their number). The order is
that of the sorted names in every case.
"""

from __future__ import annotations

import io
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from data.base import check_lattice, digest, keep_in_memory

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
ERROR_MODES = ("raise", "skip")
_FOLDER_OR_ZIP = "the path of a folder or a zip of images"
_WARNINGS = 10  # images named one by one when a set is opened
_ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width change places
_TURNED_LATE = ("JPEG", "MPO", "WEBP")  # their headers give the size before the turn, unlike TIFF's
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class ImageSource(Protocol):
    """Encoded images in the order of their sorted names; usable from threads and from forked processes."""

    path: Path
    names: list[str]

    def open(self, i: int) -> BinaryIO:
        """Seekable bytes of image i."""

    def signature(self, i: int) -> str:
        """Changes when the stored bytes change."""


class FolderSource:
    """Image files below a folder, linked folders included; names are relative paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = sorted(name for name in _walk(path) if is_image_name(name))

    def open(self, i: int) -> BinaryIO:
        return open(self.path / self.names[i], "rb")

    def signature(self, i: int) -> str:
        stat = (self.path / self.names[i]).stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"


class ZipSource:
    """Image files in a zip archive; names are the archive's."""

    def __init__(self, path: Path, field: str = "data.root_dir") -> None:
        self.path, self._field = path, field
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self.names = sorted(name for name in self._open_archive().namelist() if is_image_name(name))

    def _open_archive(self) -> zipfile.ZipFile:
        # A forked process shares the file position of its parent, hence one archive object per process.
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{self._field}: {self.path} is not a readable zip archive ({error})") from error
        return self._archive[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archive": None}

    def open(self, i: int) -> BinaryIO:
        return self._open_archive().open(self.names[i])

    def signature(self, i: int) -> str:
        info = self._open_archive().getinfo(self.names[i])
        return f"{info.file_size}-{info.CRC:08x}"


def open_source(root_dir: str | os.PathLike, field: str = "data.root_dir") -> FolderSource | ZipSource:
    """The images below a folder or in a zip; `field` is what a user calls it.

    Raises:
        ValueError: nothing there, neither folder nor zip, or no images in it.
    """
    path = existing_path(root_dir, field)
    source = FolderSource(path) if path.is_dir() else ZipSource(path, field)
    if not source.names:
        raise ValueError(f"{field}: no images in {path}, accepted are files ending in {' '.join(EXTENSIONS)}")
    return source


def existing_path(root_dir: str | os.PathLike, field: str = "data.root_dir", accepted: str = _FOLDER_OR_ZIP) -> Path:
    """`root_dir` as a path with ~ expanded; ValueError if it is empty or nothing is there."""
    if not str(root_dir):
        raise ValueError(f"{field}: empty, accepted is {accepted}")
    path = Path(root_dir).expanduser()
    if not path.exists():
        raise ValueError(f"{field}: {path} does not exist, accepted is {accepted}")
    return path


def is_image_name(name: str) -> bool:
    """Whether a relative path has an image's extension and is neither hidden nor Mac metadata."""
    parts = PurePosixPath(name).parts
    return name.lower().endswith(EXTENSIONS) and not any(p.startswith(".") or p == "__MACOSX" for p in parts)


def _walk(root: Path) -> Iterator[str]:
    visited = set()  # linked folders may form cycles
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        yield from (Path(folder, file).relative_to(root).as_posix() for file in files)


def stored_bytes(source: ImageSource, i: int) -> bytes:
    """The encoded image i.

    Raises:
        ValueError: when the file or the archive is damaged there.
    """
    try:
        with source.open(i) as stream:
            return stream.read()
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: encrypted, unsupported
        raise ValueError(f"cannot be read ({_one_line(error)})") from error


def read_image(encoded: bytes, channels: int) -> Image.Image:
    """Decode an image file at its own size.

    With 1 or 3 channels, transparent parts are shown over white. The orientation stored by cameras is applied.

    Args:
        encoded: bytes of an image file.
        channels: 1 grey, 3 RGB, 4 RGB and alpha.

    Raises:
        ValueError: damaged, or of an unsupported kind.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            opened.load()
            return with_channels(ImageOps.exif_transpose(opened), channels)
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ValueError(f"cannot be decoded ({_one_line(error)})") from error


def decode_image(encoded: bytes, size: tuple[int, int], channels: int) -> torch.Tensor:
    """Decode as `read_image`, crop centrally to the aspect ratio of `size`, reduce with an antialiased Lanczos filter.

    Args:
        encoded: bytes of an image file.
        size: (H, W).
        channels: 1 grey, 3 RGB, 4 RGB and alpha.

    Returns:
        uint8 (C, H, W).

    Raises:
        ValueError: damaged, of an unsupported kind, or smaller than `size` after cropping; says which.
    """
    pixels = torch.from_numpy(np.array(fitted(read_image(encoded, channels), size)))  # (H, W) or (H, W, C)
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def can_be_used(source: ImageSource, i: int, size: tuple[int, int], channels: int) -> bool:
    """Whether image i can be decoded to `size` (H, W)."""
    try:
        decode_image(stored_bytes(source, i), size, channels)
    except ValueError:
        return False
    return True


def fitted(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The largest centred part of an image with the aspect ratio of `size` (H, W), reduced to it.

    Raises:
        ValueError: smaller than `size` after cropping.
    """
    fault = _size_fault(image.size, size)
    if fault:
        raise ValueError(fault)
    left, top, width, height = _centre_crop(image.size, size)
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    return image if (height, width) == tuple(size) else image.resize((size[1], size[0]), resample)


class ImageFiles:
    """Chosen images of a source, decoded to one size; see the module's text for faults."""

    def __init__(
        self,
        name: str,
        source: ImageSource,
        indices: Sequence[int],
        size: tuple[int, int],
        channels: int,
        *,
        split: str = "all",
        on_error: str = "raise",
        in_memory: str = "auto",
        memory_gb: float = 8.0,
    ) -> None:
        """Check every header and, if they are to be kept in memory, decode all images.

        Args:
            name: kind of data, as in ``data.name``.
            source: where the encoded images are.
            indices: which images of the source, in the order wanted.
            size: (H, W) of the items.
            channels: 1, 3 or 4.
            split: name of the choice made by `indices`, part of the fingerprint.
            on_error: "raise" or "skip".
            in_memory: "always", "never", or "auto" = if all fit in `memory_gb` (10⁹ bytes, per process).

        Raises:
            ValueError: an argument out of range, no image left, or with "raise" a faulty image.
        """
        check_lattice(size, channels)
        if on_error not in ERROR_MODES:
            raise ValueError(f"data.on_error: {on_error!r}, accepted are {', '.join(ERROR_MODES)}")
        self.name, self.size, self.channels = name, tuple(size), channels
        self.pixels: torch.Tensor | None = None
        self._source, self._split, self._on_error = source, split, on_error
        self._warned: set[int] = set()
        self._indices = self._usable(list(indices))
        if keep_in_memory(in_memory, memory_gb, len(self), channels, size):
            pixels = torch.empty((len(self), channels, *size), dtype=torch.uint8)
            for i, image in enumerate(_in_threads(self._decode_or_next, range(len(self)), f"decoding {name}")):
                pixels[i] = image
            self.pixels = pixels

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self._decode_or_next(i) if self.pixels is None else self.pixels[i]

    def item_name(self, i: int) -> str:
        return self._source.names[self._indices[i]]

    def fingerprint(self) -> str:
        description = {
            "name": self.name,
            "size": self.size,
            "channels": self.channels,
            "split": self._split,
            "on_error": self._on_error,
        }
        return digest(description, (f"{self._source.names[i]} {self._source.signature(i)}" for i in self._indices))

    def _usable(self, indices: list[int]) -> list[int]:
        """The indices whose header is good."""
        faults = list(_in_threads(self._header_fault, indices, f"reading {self.name}"))
        bad = [(self._source.names[i], fault) for i, fault in zip(indices, faults) if fault]
        if bad and self._on_error == "raise":
            more = f" and {len(bad) - 1} more of {len(indices)} images" if len(bad) > 1 else ""
            raise ValueError(
                f"data.root_dir: {self._source.path}: {bad[0][0]} {bad[0][1]}{more}; "
                "data.on_error=skip leaves such images out"
            )
        for name, fault in bad[:_WARNINGS]:
            _log.warning("%s: left out %s, which %s", self._source.path, name, fault)
        if len(bad) > _WARNINGS:
            _log.warning("%s: left out %d of %d images in all", self._source.path, len(bad), len(indices))
        usable = [i for i, fault in zip(indices, faults) if not fault]
        if not usable:
            reason = f"; {bad[0][0]} {bad[0][1]}" if bad else ""
            raise ValueError(f"data.root_dir: {self._source.path}: no usable image for {self._split!r}{reason}")
        return usable

    def _header_fault(self, i: int) -> str | None:
        try:
            with self._source.open(i) as stream, Image.open(stream) as image:
                turned = image.format in _TURNED_LATE and image.getexif().get(_ORIENTATION, 1) >= 5
                return _size_fault(image.size[::-1] if turned else image.size, self.size)
        except Exception as error:  # decoders raise nearly anything on damaged data
            return f"cannot be read ({_one_line(error)})"

    def _decode_or_next(self, i: int) -> torch.Tensor:
        """Image i or, if it is damaged and may be skipped, the next good one."""
        for offset in range(len(self)):
            index = self._indices[(i + offset) % len(self)]
            try:
                return decode_image(stored_bytes(self._source, index), self.size, self.channels)
            except ValueError as error:
                message = f"{self._source.path}: {self._source.names[index]} {_one_line(error)}"
                if self._on_error == "raise":
                    raise ValueError(f"data.root_dir: {message}; data.on_error=skip goes on without it") from error
                if index not in self._warned:
                    self._warned.add(index)
                    _log.warning("%s; the next image takes its place", message)
        raise ValueError(f"data.root_dir: {self._source.path}: none of {len(self)} images can be decoded")


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """8-bit L, RGB or RGBA, for 1, 3 or 4 channels; transparent parts are shown over white in the first two."""
    mode = _MODES[channels]
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit grey is not supported")
    transparent = "transparency" in image.info or image.getbands()[-1] in ("A", "a")
    if mode != "RGBA" and transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _centre_crop(image_wh: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the largest centred part with the aspect ratio H:W of `size`."""
    width, height = image_wh
    if width * size[0] > height * size[1]:
        width = max(1, round(height * size[1] / size[0]))
    else:
        height = max(1, round(width * size[0] / size[1]))
    return (image_wh[0] - width) // 2, (image_wh[1] - height) // 2, width, height


def _size_fault(image_wh: tuple[int, int], size: tuple[int, int]) -> str | None:
    _, _, width, height = _centre_crop(image_wh, size)
    if height >= size[0] and width >= size[1]:
        return None
    return f"is {image_wh[1]}x{image_wh[0]} (HxW), needed is at least {size[0]}x{size[1]}"


def _in_threads(function: Callable[[int], _Result], items: Sequence[int], title: str) -> Iterator[_Result]:
    """Results in order; decoders release the interpreter lock, so threads are enough."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from tqdm(pool.map(function, items), desc=title, total=len(items), disable=None, leave=False)


def _one_line(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"  # Pillow would name an object of Python
    return " ".join(str(error).split()) or type(error).__name__
