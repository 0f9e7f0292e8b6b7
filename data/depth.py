"""Images of more than 8 bits a sample: their exact samples, whatever the container, and the range that they fill.

Files of 16 bits often hold 10, 12 or 14. What is white is taken from the file where it says less than its container
holds (the bits or the largest sample of a TIFF, the maximum of a PGM or PPM), and else measured: the
least of 8, 10, 12, 14 and 16 bits that hold every sample. Opacity is no colour, and does not decide.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what is decoded; other decoders run programs
BITS = (8, 10, 12, 14, 16)
LIMIT = 65535  # the largest sample of 16 bits
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE, _PLANES = 258, 262, 281, 284  # TIFF tags
_WHITE_IS_ZERO, _SEPARATE = 0, 2  # values of two of them
_LOW_FIRST = "L" if sys.byteorder == "little" else "B"
# Pillow cuts these to their high bytes; in the other byte order it cuts them to their low ones.
_OTHER_HALF = {
    f"{mode};16{order}": f"{mode};16{'L' if (_LOW_FIRST if order == 'N' else order) == 'B' else 'B'}"
    for mode in ("RGB", "RGBX", "RGBA")
    for order in "BLN"
}
_LOCK = threading.Lock()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deep:
    """Samples (H, W, B) of 1 to 4 bands, the last of 2 or 4 the opacity; white: what the file says of it."""

    samples: np.ndarray
    white: int | None

    @property
    def largest(self) -> int:
        """The largest sample of a colour."""
        bands = self.samples.shape[2]
        return int(self.samples[..., : bands - (bands in (2, 4))].max())

    def to_8bit(self, white: int) -> Image.Image:
        """The samples from 0 to `white` as 0 to 255, rounded."""
        colours = self.samples.shape[2] - (self.samples.shape[2] in (2, 4))
        opaque = white if self.samples[..., colours:].max(initial=0) <= white else LIMIT
        whites = np.array([white] * colours + [opaque] * (self.samples.shape[2] - colours), np.int64)
        pixels = (self.samples.clip(max=whites) * 255 + whites // 2) // whites
        return Image.fromarray(pixels.astype(np.uint8).squeeze(2) if len(whites) == 1 else pixels.astype(np.uint8))


class White:
    """The white of images that belong together and do not say it themselves, measured once, when first asked for.

    Args:
        where: the images, for the log.
        images: those of more than 8 bits a sample; they are asked for until 16 bits are sure.
    """

    def __init__(self, where: str, images: Callable[[], Iterable[Deep]]) -> None:
        self._where, self._images = where, images
        self._white: int | None = None

    def __call__(self) -> int:
        with _LOCK:
            if self._white is None:
                most, stated = None, set[int]()
                for image in self._images():
                    if image.white is not None:
                        stated.add(image.white)
                    else:
                        most = max(most or 0, image.largest)
                        if measured_white(most) == LIMIT:
                            break
                self._white = measured_white(most or 0)
                found = [f"{self._white}, as measured"] if most is not None else []
                found += [f"{white}, as files say" for white in sorted(stated)]
                _log.info("%s: images of more than 8 bits a sample; white is %s", self._where, "; ".join(found))
            return self._white


def measured_white(largest: int) -> int:
    """The largest number of the least of `BITS` that hold `largest`, 0 … 65535."""
    return next((1 << bits) - 1 for bits in BITS if largest < 1 << bits)


def open_image(stream) -> Image.Image:
    """Pillow's image of a stream, or a file, of one of `FORMATS`; not decoded yet."""
    return Image.open(stream, formats=FORMATS)


def is_deep(image: Image.Image) -> bool:
    """Whether an image, opened and not decoded yet, has more than 8 bits a sample."""
    if image.mode.startswith("I") or max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) or (1,)) > 8:
        return True
    for _, _, _, arguments in getattr(image, "tile", ()):
        parts = arguments if isinstance(arguments, tuple) else (arguments,)
        deep_ppm = image.format == "PPM" and len(parts) == 2 and isinstance(parts[1], int) and parts[1] > 255
        if deep_ppm or (parts and isinstance(parts[0], str) and ";16" in parts[0]):
            return True
    return False


def deep_image(encoded: bytes) -> Deep | None:
    """The samples of an image file of more than 8 bits a sample; None for others.

    Raises:
        ValueError: negative samples, samples beyond 16 bits, floating point, an arrangement that is not read.
    """
    with open_image(io.BytesIO(encoded)) as image:
        if image.mode == "F":
            raise ValueError("has floating-point samples, which say not what is white; accepted: integers")
        if not is_deep(image):
            return None
        white = None
        if image.format == "PPM":
            samples, white = _netpbm_samples(image, encoded)
        else:
            tags = getattr(image, "tag_v2", {})
            if tags.get(_PLANES) == _SEPARATE and len(image.getbands()) > 1:
                raise ValueError("has more than 8 bits a sample in separate planes; accepted: bands pixel by pixel")
            samples, white = _samples(image, encoded), _white_of_tags(tags)
            if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
                samples = (white or measured_white(int(samples.max()))) - samples
    if samples.min() < 0 or samples.max() > LIMIT:
        raise ValueError(f"has samples from {samples.min()} to {samples.max()}; accepted: 0 to {LIMIT}")
    return Deep(samples, white if white is not None and samples.max() <= white < LIMIT else None)


def _samples(image: Image.Image, encoded: bytes) -> np.ndarray:
    if image.mode.startswith("I"):
        samples = np.asarray(image).astype(np.int64)[..., None]
    elif image.mode in ("LA", "RGBA") and image.format == "PNG" and encoded[25] == 4:
        # Grey and opacity of 16 bits have the bytes, and so the filters, of four samples of 8 bits.
        header = encoded[12:24] + b"\x08\x06" + encoded[26:29]
        crc = zlib.crc32(header).to_bytes(4, "big")
        with open_image(io.BytesIO(encoded[:12] + header + crc + encoded[33:])) as four:
            high_low = np.asarray(four).astype(np.int64)
        return high_low[..., 0::2] << 8 | high_low[..., 1::2]
    else:
        with open_image(io.BytesIO(encoded)) as other:
            other.tile = [_other_half(tile) for tile in other.tile]
            samples = np.asarray(image).astype(np.int64) << 8 | np.asarray(other).astype(np.int64)
    clear = image.info.get("transparency")
    if clear is not None and image.format == "PNG":
        samples = np.concatenate([samples, LIMIT * (samples != clear).any(axis=2, keepdims=True)], axis=2)
    return samples


def _other_half(tile: tuple) -> tuple:
    arguments = tile[3]
    raw = arguments if isinstance(arguments, str) else arguments[0]
    if raw not in _OTHER_HALF:
        raise ValueError(f"has 16 bits a sample as {raw}; accepted: grey or RGB, with or without opacity")
    new = _OTHER_HALF[raw] if isinstance(arguments, str) else (_OTHER_HALF[raw], *arguments[1:])
    return tile._replace(args=new) if hasattr(tile, "_replace") else (*tile[:3], new)


def _netpbm_samples(image: Image.Image, encoded: bytes) -> tuple[np.ndarray, int]:
    """The samples of a PGM or PPM, most significant byte first, and its maximum."""
    _, _, offset, arguments = image.tile[0]  # type: ignore[attr-defined]  # of files alone
    white = arguments[1] if isinstance(arguments, tuple) and isinstance(arguments[1], int) else LIMIT
    shape = (image.height, image.width, len(image.getbands()))
    if encoded[:2] in (b"P2", b"P3"):
        lines = (line.partition(b"#")[0] for line in encoded[offset:].splitlines())
        samples = np.array(b" ".join(lines).split()[: np.prod(shape)], np.int64)
    else:
        samples = np.frombuffer(encoded, ">u2", int(np.prod(shape)), offset).astype(np.int64)
    return samples.reshape(shape), white


def _white_of_tags(tags) -> int | None:
    """The white that a TIFF states."""
    bits, largest = tags.get(_BITS_PER_SAMPLE), tags.get(_MAX_SAMPLE)
    if largest is not None:
        return int(max(largest) if isinstance(largest, tuple) else largest) or None
    return (1 << max(bits)) - 1 if bits and 8 < max(bits) < 16 else None
