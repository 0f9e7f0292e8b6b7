"""Decoding image files: 8-bit pixels at their own size, or cropped and reduced to a given one."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data.depth import FORMATS, Deep, White, deep_image, is_deep, measured_white, open_image
from data.sources import ImageSource, stored_bytes

_ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width change places
_TURNED_LATE = ("JPEG", "MPO", "WEBP")  # their headers give the size before the turn, unlike TIFF's
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What the header of an image file says: its size (W, H) as shown, whether it has several pages, and its depth."""

    size: tuple[int, int]
    pages: bool
    deep: bool


class Decoder:
    """Decodes the images of a source alike: those of more than 8 bits a sample by one white.

    Of an image with several pages the first counts, and a warning says so once.
    """

    def __init__(self, source: ImageSource, channels: int) -> None:
        self.source, self._channels, self._warned = source, channels, False
        self.white = White(str(source.path), self._deep_images)

    def __call__(self, i: int) -> Image.Image:
        """Image i at its own size; ValueError as of `read_image`."""
        encoded = stored_bytes(self.source, i)
        image = read_image(encoded, self._channels, self.white)
        if not self._warned and has_pages(encoded):
            self.warn_of_pages(i)
        return image

    def warn_of_pages(self, i: int, count: int = 1) -> None:
        """Say once that image i, the first of `count`, has several pages."""
        self._warned = True
        more = f" and {count - 1} more images have" if count > 1 else " has"
        _log.warning("%s: %s%s several pages, of which the first alone is used", self.source.path,
                     self.source.names[i], more)  # fmt: skip

    def header(self, i: int) -> Header:
        """The header of image i; ValueError where it cannot be read."""
        try:
            with self.source.open(i) as stream, open_image(stream) as image:
                turned = image.format in _TURNED_LATE and image.getexif().get(_ORIENTATION, 1) >= 5
                return Header(image.size[::-1] if turned else image.size, _has_pages(image), is_deep(image))
        except Exception as error:  # decoders raise nearly anything on damaged data
            raise ValueError(f"cannot be read ({one_line(error)})") from error

    def _deep_images(self) -> Iterator[Deep]:
        for i in range(len(self.source.names)):
            try:
                image = deep_image(stored_bytes(self.source, i)) if self.header(i).deep else None
            except Exception:  # a damaged image is told of where it is used
                continue
            if image is not None:
                yield image


def read_image(encoded: bytes, channels: int, white: Callable[[], int] | None = None) -> Image.Image:
    """Decode an image file at its own size.

    With 1 or 3 channels, transparent parts are shown over white. The orientation stored by cameras is applied.

    Args:
        encoded: bytes of an image file.
        channels: 1 grey, 3 RGB, 4 RGB and alpha.
        white: the sample that is white where there are more than 8 bits and the file does not say it; by default it
            is measured on this image.

    Raises:
        ValueError: damaged, or of an unsupported kind.
    """
    try:
        with open_image(io.BytesIO(encoded)) as opened:
            deep = deep_image(encoded) if is_deep(opened) or opened.mode == "F" else None
            if deep is None:
                opened.load()
                return with_channels(ImageOps.exif_transpose(opened), channels)
            image = deep.to_8bit(deep.white or (white() if white else measured_white(deep.largest)))
            opened.load()  # which turns TIFFs
            exif = Image.Exif()
            exif[_ORIENTATION] = opened.getexif().get(_ORIENTATION, 1)
            image.info["exif"] = exif.tobytes()
            return with_channels(ImageOps.exif_transpose(image), channels)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ValueError(f"cannot be decoded ({one_line(error)})") from error


def has_pages(encoded: bytes) -> bool:
    """Whether an image file has several pages, or frames of an animation."""
    try:
        with open_image(io.BytesIO(encoded)) as image:
            return _has_pages(image)
    except Exception:  # decoders raise nearly anything on damaged data
        return False


def _has_pages(image: Image.Image) -> bool:
    # The second picture of a camera's MPO is a preview or a part of the first.
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def decode_image(
    encoded: bytes, size: tuple[int, int], channels: int, white: Callable[[], int] | None = None
) -> torch.Tensor:
    """Decode as `read_image`, crop centrally to the aspect ratio of `size`, reduce with an antialiased Lanczos filter.

    Args:
        encoded: bytes of an image file.
        size: (H, W).
        channels: 1 grey, 3 RGB, 4 RGB and alpha.
        white: as of `read_image`.

    Returns:
        uint8 (C, H, W).

    Raises:
        ValueError: damaged, of an unsupported kind, or smaller than `size` after cropping; says which.
    """
    pixels = torch.from_numpy(np.array(fitted(read_image(encoded, channels, white), size)))  # (H, W) or (H, W, C)
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
    fault = size_fault(image.size, size)
    if fault:
        raise ValueError(fault)
    left, top, width, height = _centre_crop(image.size, size)
    if (width, height) != image.size:
        image = image.crop((left, top, left + width, top + height))
    return image if (height, width) == tuple(size) else image.resize((size[1], size[0]), resample)


def with_channels(image: Image.Image, channels: int, white: Callable[[], int] | None = None) -> Image.Image:
    """8-bit L, RGB or RGBA, for 1, 3 or 4 channels; transparent parts are shown over white in the first two.

    Args:
        image: of any mode but 32-bit floating point.
        channels: 1 grey, 3 RGB, 4 RGB and alpha.
        white: the sample that is white, of images of more than 8 bits; by default it is measured on this image.
    """
    mode = _MODES[channels]
    deep = in_memory(image)
    if deep:
        image = deep.to_8bit(white() if white else measured_white(deep.largest))
    transparent = "transparency" in image.info or image.getbands()[-1] in ("A", "a")
    if mode != "RGBA" and transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def in_memory(image: Image.Image) -> Deep | None:
    """The samples of an image in memory of more than 8 bits a sample, None for others; ValueError as `deep_image`."""
    if not image.mode.startswith(("I", "F")):
        return None
    samples = np.asarray(image)
    if image.mode == "F" or samples.min() < 0 or samples.max() > 65535:
        raise ValueError("has samples in floating point or beyond 16 bits; accepted: integers from 0 to 65535")
    return Deep(samples.astype(np.int64)[..., None], None)


def _centre_crop(image_wh: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the largest centred part with the aspect ratio H:W of `size`."""
    width, height = image_wh
    if width * size[0] > height * size[1]:
        width = max(1, round(height * size[1] / size[0]))
    else:
        height = max(1, round(width * size[0] / size[1]))
    return (image_wh[0] - width) // 2, (image_wh[1] - height) // 2, width, height


def size_fault(image_wh: tuple[int, int], size: tuple[int, int]) -> str | None:
    """Why an image (W, H) cannot be reduced to `size` (H, W), None where it can."""
    _, _, width, height = _centre_crop(image_wh, size)
    if height >= size[0] and width >= size[1]:
        return None
    return f"is {image_wh[1]}x{image_wh[0]} (HxW), needed is at least {size[0]}x{size[1]}"


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of the formats {', '.join(FORMATS)}"  # Pillow would name an object of Python
    return " ".join(str(error).split()) or type(error).__name__
