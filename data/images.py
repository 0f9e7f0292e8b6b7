"""Encoded images of a source as a data set of one size.

Two kinds of faults are told apart, the same way whether images are kept in memory or decoded on the fly:

* Seen in the header, when the set is opened: not an image, or smaller than the lattice (upscaling would
  invent detail). ``on_error="raise"`` refuses the set; ``"skip"`` drops these images, so the set is shorter.
* Seen when decoding: truncated or damaged pixels. ``"raise"`` raises, at opening if images are kept in memory
  and else when the image is reached; ``"skip"`` puts the next good image in order (cyclically) in its place.

Both log a warning that names the image (of many bad headers, the first ones and their number). The order is
that of the sorted names in every case.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from tqdm import tqdm

from data.base import Keep, check_lattice, digest, keep_in_memory, own_memory
from data.decoding import Decoder, Header, decode_image, one_line, size_fault
from data.sources import ImageSource, stored_bytes

ERROR_MODES = ("raise", "skip")
_WARNINGS = 10  # images named one by one when a set is opened
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


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
        keep: Keep = own_memory,
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
            in_memory: "always", "never", or "auto" = if all fit in `memory_gb` (10⁹ bytes).
            keep: where they are kept, and by whom filled.

        Raises:
            ValueError: an argument out of range, no image left, or with "raise" a faulty image.
        """
        check_lattice(size, channels)
        if on_error not in ERROR_MODES:
            raise ValueError(f"data.on_error is {on_error!r}; accepted: {', '.join(ERROR_MODES)}")
        self.name, self.size, self.channels = name, (size[0], size[1]), channels
        self.pixels: torch.Tensor | None = None
        self._source, self._split, self._on_error = source, split, on_error
        self._decoder = Decoder(source, channels)
        self._white: int | None = None  # of images of more than 8 bits, where there are any
        self._warned: set[int] = set()
        self._indices = self._usable(list(indices))
        if keep_in_memory(in_memory, memory_gb, len(self), channels, size):
            self.pixels = keep((len(self), channels, *size), self._decode_all)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return self._decode_or_next(i) if self.pixels is None else self.pixels[i]

    def decoded(self, i: int) -> torch.Tensor:
        """Image i itself, read anew; ValueError where it is damaged, also with on_error="skip"."""
        encoded = stored_bytes(self._source, self._indices[i])
        return decode_image(encoded, self.size, self.channels, self._decoder.white)

    def item_name(self, i: int) -> str:
        return self._source.names[self._indices[i]]

    def fingerprint(self) -> str:
        description = {
            "name": self.name,
            "size": self.size,
            "channels": self.channels,
            "split": self._split,
            **({} if self._white is None else {"white": self._white}),
        }
        signatures = _in_threads(self._source.signature, self._indices, f"comparing {self.name}")
        return digest(description, (f"{self._source.names[i]} {s}" for i, s in zip(self._indices, signatures)))

    def _usable(self, indices: list[int]) -> list[int]:
        """The indices whose header is good."""
        headers = list(_in_threads(self._header, indices, f"reading {self.name}"))
        faults = [read if isinstance(read, str) else size_fault(read.size, self.size) for read in headers]
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
        read = {i: header for i, header in zip(indices, headers) if isinstance(header, Header)}
        paged = [i for i in usable if read[i].pages]
        if paged:
            self._decoder.warn_of_pages(paged[0], len(paged))
        if any(read[i].deep for i in usable):
            self._white = self._decoder.white()  # of all images of the source, so that its splits agree
        return usable

    def _header(self, i: int) -> Header | str:
        """The header of image i, or why it cannot be read."""
        try:
            return self._decoder.header(i)
        except ValueError as error:
            return str(error)

    def _decode_all(self, pixels: torch.Tensor) -> None:
        for i, image in enumerate(_in_threads(self._decode_or_next, range(len(self)), f"decoding {self.name}")):
            pixels[i] = image

    def _decode_or_next(self, i: int) -> torch.Tensor:
        """Image i or, if it is damaged and may be skipped, the next good one."""
        for offset in range(len(self)):
            index = self._indices[(i + offset) % len(self)]
            try:
                return self.decoded((i + offset) % len(self))
            except ValueError as error:
                message = f"{self._source.path}: {self._source.names[index]} {one_line(error)}"
                if self._on_error == "raise":
                    raise ValueError(f"data.root_dir: {message}; data.on_error=skip goes on without it") from error
                if index not in self._warned:
                    self._warned.add(index)
                    _log.warning("%s; the next image takes its place", message)
        raise ValueError(f"data.root_dir: {self._source.path}: none of {len(self)} images can be decoded")


def _in_threads(function: Callable[[int], _Result], items: Sequence[int], title: str) -> Iterator[_Result]:
    """Results in order; decoders release the interpreter lock, so threads are enough."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        yield from tqdm(pool.map(function, items), desc=title, total=len(items), disable=None, leave=False)
