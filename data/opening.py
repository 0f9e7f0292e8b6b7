"""Opening files that others made: regular files alone, of bounded size, and JSON of the structure that is wanted."""

from __future__ import annotations

import io
import json
import os
import stat
import zlib
from typing import Any, BinaryIO, TypeVar

_T = TypeVar("_T")

LARGEST = 1 << 30  # bytes of one image, array or table in memory
_END = 4096
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def check_regular(path: str | os.PathLike) -> os.stat_result:
    """The status of a regular file, links followed.

    Raises:
        OSError: nothing there, or something else: a pipe could be waited for and a device be read for ever.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS.items() if is_kind(status.st_mode)), "something else")
        raise OSError(f"{kind}, not a file")
    return status


def open_regular(path: str | os.PathLike, largest: int = LARGEST) -> BinaryIO:
    """A regular file of at most `largest` bytes, to be read.

    Raises:
        OSError: nothing there, not a regular file, or a larger one.
    """
    size = check_regular(path).st_size
    if size > largest:
        raise OSError(f"{size} bytes; accepted: at most {largest}")
    return open(path, "rb")


def read_at_most(stream: BinaryIO, largest: int = LARGEST) -> bytes:
    """What is left of a stream; OSError where that is more than `largest` bytes."""
    content = io.BytesIO()
    while part := stream.read(min(1 << 20, largest + 1 - content.tell())):
        content.write(part)
        if content.tell() > largest:
            raise OSError(f"more than {largest} bytes; accepted: at most {largest}")
    return content.getvalue()


def size_and_end(stream: BinaryIO) -> str:
    """The number of bytes of a seekable stream and a checksum of the last ones; closes it.

    In compressed images the last bytes depend on all that come before.
    """
    with stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _END))
        return f"{size}-{zlib.crc32(stream.read(_END)):08x}"


def read_json(path: str | os.PathLike, kind: type[_T], accepted: str) -> _T:
    """The content of a JSON file.

    Args:
        path: the file.
        kind: what it must be at the top, e.g. dict.
        accepted: what the file should hold, for the message.
    Raises:
        ValueError: naming the file, when it cannot be read, holds no JSON, or another kind of value.
    """
    try:
        with open_regular(path) as file:
            text = file.read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); accepted: {accepted}") from None
    return parse_json(text, kind, str(path), accepted)


def parse_json(text: bytes | str, kind: type[_T], where: str, accepted: str) -> _T:
    """`read_json` of a text found in `where`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: holds no JSON ({' '.join(str(error).split())}); accepted: {accepted}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{where}: holds {_in_json(content)}; accepted: {accepted}")
    return content


def _in_json(content: Any) -> str:
    """What a value is called in JSON."""
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(content), "a number")
