"""Images in uncompressed tar archives: one, or several that share a set out (shards), as webdataset lays them out.

When a source is opened its headers are read once, and the place of every image is kept. So any image can be read at any
time, in any order and by any process, which is what makes resuming exact. The package webdataset reads archives from
beginning to end and shuffles what it has read; where it was cannot be found again.

Members that are links, devices, pipes or sparse are left out and counted. A name is only a name: nothing is unpacked.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.names import MANIFEST, image_names, is_image_name
from data.opening import LARGEST, open_regular, size_and_end

ENDINGS = (".tar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst", ".tgz")
_ANY_SIZE = 1 << 62
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BLOCK = 512
_FILES, _FOLDERS = b"\x0007", b"5DV"  # kinds of members
_LEFT_OUT = {b"1": "hard links", b"2": "symbolic links", b"3": "devices", b"4": "devices", b"6": "pipes",
             b"S": "sparse files", b"M": "parts of files"}  # fmt: skip
_EMPTY = b"123456"  # hold no data, whatever size they name
_EXTENSIONS = b"LKxXg"  # hold names and fields of what follows
_LONGEST = 1 << 20  # bytes of a name, and of what extends a header
_AFTER_END = 20 * _BLOCK  # archives are filled with zeros up to a multiple of this
_MOST_SHARDS = 100_000
_BRACES = re.compile(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}")
_log = logging.getLogger(__name__)


class TarSource:
    """Image files in tar archives (an `ImageSource`); names are those of the members.

    Where archives share names, each name begins with that of its archive, as if each were unpacked into a folder. Of
    several images of a sample, `key.jpg` and `key.mask.png`, that of one ending is taken.

    Args:
        path: the archive, the folder or the pattern, for messages.
        shards: the archives.
        field: what a user calls the path.
    Raises:
        ValueError: an archive that cannot be read, is compressed, damaged or cut short.
    """

    def __init__(self, path: Path, shards: Sequence[Path], field: str = "data.root_dir") -> None:
        self.path, self._shards = path, list(shards)
        with ThreadPoolExecutor() as pool:
            indices = list(pool.map(partial(_read_index, field=field), self._shards))
        self._ends = [index.end for index in indices]
        names = _full_names(self._shards, [index.names for index in indices])
        left_out = sum((index.left_out for index in indices), Counter[str]())
        if left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common())
            _log.warning("%s: left out images that are no files (%s)", path, kinds)
        images = image_names(path, names)
        self.names = one_of_a_key(images)
        if len(self.names) < len(images):
            _log.warning("%s: left out %d further images of samples that have one", path, len(images) - len(self.names))
        place = {name: i for i, name in enumerate(names)}
        manifests = sorted(name for name in place if name.rpartition("/")[2] == MANIFEST)
        self._beside = {name: i for i, name in enumerate(manifests, len(self.names))}
        kept = [*self.names, *manifests]
        order = np.fromiter((place[name] for name in kept), np.int64, len(kept))
        self._shard = np.repeat(np.arange(len(indices), dtype=np.int32), [len(i.names) for i in indices])[order]
        self._offset, self._size = (
            np.concatenate([np.asarray(getattr(index, column), np.int64) for index in indices])[order]
            for column in ("offsets", "sizes")
        )

    def open(self, i: int) -> BinaryIO:
        shard, offset, size = (int(column[i]) for column in (self._shard, self._offset, self._size))
        if size > LARGEST:
            raise OSError(f"{size} bytes; accepted: at most {LARGEST}")
        archive = open_regular(self._shards[shard], _ANY_SIZE)
        if os.fstat(archive.fileno()).st_size != self._ends[shard]:
            archive.close()
            raise OSError(f"{self._shards[shard]} has changed since it was opened")
        return io.BufferedReader(_Member(archive, offset, size))

    def signature(self, i: int) -> str:
        return size_and_end(self.open(i))

    def beside(self, name: str) -> BinaryIO | None:
        """The manifest of samples of that name, None where there is none."""
        return self.open(self._beside[name]) if name in self._beside else None


class _Member(io.RawIOBase):
    """The bytes of a member. It has a position of its own, which no fork shares."""

    def __init__(self, archive: BinaryIO, offset: int, size: int) -> None:
        self._archive, self._offset, self._size, self._at = archive, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(0, self._size - self._at))
        part = os.pread(self._archive.fileno(), wanted, self._offset + self._at)
        if wanted and not part:
            raise OSError("the archive is cut short")
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        super().close()
        self._archive.close()


def is_tar(path: Path) -> bool:
    """Whether a file is a tar archive, perhaps a compressed one, by its beginning or its name."""
    try:
        with open_regular(path, _ANY_SIZE) as file:
            head = file.read(_BLOCK)
    except OSError:
        return False
    return head.startswith(tuple(_COMPRESSED)) or head[257:262] == b"ustar" or path.name.endswith(ENDINGS)


def tars_in(folder: Path) -> list[Path]:
    """The archives that lie in a folder, compressed ones too, sorted."""
    return sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS) and not p.name.startswith("."))


def is_pattern(path: Path) -> bool:
    """Whether a path stands for several: shards-{000..012}.tar, {a,b}.tar, *.tar."""
    return has_magic(str(path)) or _BRACES.search(str(path)) is not None


def matching(pattern: Path, field: str) -> list[Path]:
    """The paths that a pattern stands for, those of braces in their order, those of * sorted; ValueError for none."""
    found: dict[str, None] = {}
    for name in itertools.islice(_expanded(str(pattern)), _MOST_SHARDS):
        found.update(dict.fromkeys(sorted(glob(name)) if has_magic(name) else [name]))
    if not 0 < len(found) < _MOST_SHARDS:
        raise ValueError(f"{field}: {pattern} stands for {'no file' if not found else 'too many files'}; accepted: "
                         f"the pattern of 1 to {_MOST_SHARDS - 1} tar archives")  # fmt: skip
    return [Path(name) for name in found]


def _expanded(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    if match[3] is not None:
        parts: Iterator[str] = iter(match[3].split(","))
    else:
        first, last = int(match[1]), int(match[2])
        width = max(map(len, match.group(1, 2))) if any(n[0] == "0" < n[1:] for n in match.group(1, 2)) else 0
        step = 1 if first <= last else -1
        parts = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for part in parts:
        yield from _expanded(pattern[: match.start()] + part + pattern[match.end() :])


def _full_names(shards: list[Path], names: list[list[str]]) -> list[str]:
    """The names of all members, those of each archive behind its own name where archives have images in common."""
    images = [set(filter(is_image_name, part)) for part in names]
    if len(set().union(*images)) < sum(map(len, images)):
        root = os.path.commonpath([shard.absolute().parent for shard in shards])
        folders = [os.path.relpath(shard.absolute(), root).removesuffix(".tar") for shard in shards]
        names = [[f"{folder}/{name}" for name in part] for folder, part in zip(folders, names)]
    return list(itertools.chain.from_iterable(names))


def one_of_a_key(names: list[str]) -> list[str]:
    """Sorted names without those of a sample that has an image of one ending: webdataset keys end at the first dot."""
    keys = [name[: name.index(".", name.rfind("/") + 1)] for name in names]
    first: dict[str, str] = {}
    for key, name in zip(keys, names):
        if name.count(".", len(key)) == 1:
            first.setdefault(key, name)
    return [name for key, name in zip(keys, names) if first.get(key, name) == name]


@dataclass
class _Index:
    """The files in an archive of `end` bytes. left_out: how many of each kind have the name of an image."""

    end: int
    names: list[str] = field(default_factory=list)
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    left_out: Counter[str] = field(default_factory=Counter)


def _read_index(path: Path, field: str) -> _Index:
    try:
        with open_regular(path, _ANY_SIZE) as archive:
            index = _Index(os.fstat(archive.fileno()).st_size)
            for kind, name, offset, size in _members(archive.fileno(), index.end):
                if kind in _FILES:
                    index.names.append(name)
                    index.offsets.append(offset)
                    index.sizes.append(size)
                elif kind not in _FOLDERS and is_image_name(name):
                    index.left_out[_LEFT_OUT.get(kind, "members of other kinds")] += 1
    except OSError as error:
        raise ValueError(f"{field}: {path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ValueError(f"{field}: {path} {error}") from None
    return index


def _members(file: int, end: int) -> Iterator[tuple[bytes, str, int, int]]:
    """(kind, name, offset, size) of the members of an archive of `end` bytes; ValueError says what is wrong with it.

    A header has a block of 512 bytes. Before it may stand members that hold its name (GNU) or its fields (pax).
    """
    at, long_name, fields = 0, b"", dict[bytes, bytes]()
    while True:
        block = os.pread(file, _BLOCK, at)
        for magic, tool in _COMPRESSED.items() if at == 0 else ():
            if block.startswith(magic):
                raise ValueError(f"is compressed, so images in it cannot be reached one by one; accepted: the archive "
                                 f"as it is after {tool} -dk")  # fmt: skip
        if len(block) < _BLOCK:
            raise ValueError(f"is a tar cut short, at {end} bytes; accepted: a whole one")
        if not any(block):
            if any(os.pread(file, _AFTER_END, at)):
                raise ValueError(f"has more behind its end at byte {at}, as archives have that cat joined; accepted: "
                                 "one archive a file")  # fmt: skip
            return
        if not _is_header(block):
            raise ValueError(f"has no header of a tar archive at byte {at}; accepted: an undamaged uncompressed tar")
        kind, extends = block[156:157], block[156] in _EXTENSIONS
        size = _octal(block[124:136], at) if extends or b"size" not in fields else _decimal(fields[b"size"], at)
        at += _BLOCK
        more = kind == b"S" and block[482]
        while more:  # the map of a sparse file goes on
            part = os.pread(file, _BLOCK, at)
            at, more = at + _BLOCK, len(part) == _BLOCK and part[504]
        size = 0 if kind in _EMPTY else size
        if at + size > end:
            raise ValueError(f"is a tar cut short, at {end} of {at + size} bytes or more; accepted: a whole one")
        if extends:
            if size > _LONGEST:
                raise ValueError(f"has a header of {size} bytes at byte {at}; accepted: at most {_LONGEST}")
            if kind == b"L":
                long_name = os.pread(file, size, at).partition(b"\0")[0]
            elif kind in b"xX":
                fields = _pax_fields(os.pread(file, size, at), at)
        else:
            name = fields.get(b"path") or long_name or _short_name(block)
            if any(key.startswith(b"GNU.sparse.") for key in fields):
                kind = b"S"
            yield kind, _text(name), at, size
            long_name, fields = b"", {}
        at += -(-size // _BLOCK) * _BLOCK


def _is_header(block: bytes) -> bool:
    """Whether the checksum of a header is right: the sum of its bytes, of which old programs took signed ones."""
    others = block[:148] + b" " * 8 + block[156:]
    try:
        difference = sum(others) - _octal(block[148:156], 0)
        return not difference or difference == 256 * sum(byte > 127 for byte in others)
    except ValueError:
        return False


def _octal(digits: bytes, at: int) -> int:
    """A number of a header: octal, or where the first bit is set binary."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    text = digits.partition(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        raise ValueError(f"has the size {digits!r} at byte {at}; accepted: an undamaged tar archive")
    return int(text or b"0", 8)


def _decimal(digits: bytes, at: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", digits):
        raise ValueError(f"has the number {digits[:20]!r} at byte {at}; accepted: an undamaged tar archive")
    return int(digits)


def _pax_fields(text: bytes, at: int) -> dict[bytes, bytes]:
    """Lines "length key=value", where the length is that of the line."""
    fields, start = {}, 0
    while start < len(text):
        space = text.find(b" ", start, start + 20)
        length = _decimal(text[start:space] if space > 0 else b"", at)
        key, equals, value = text[space + 1 : start + length].partition(b"=")
        if not equals or not value.endswith(b"\n") or start + length > len(text):
            raise ValueError(f"has a broken pax header at byte {at}; accepted: an undamaged tar archive")
        fields[key] = value[:-1]
        start += length
    return fields


def _short_name(block: bytes) -> bytes:
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _text(name: bytes) -> str:
    return re.sub(r"^(\./+)+", "", name.decode("utf-8", "surrogateescape"))
