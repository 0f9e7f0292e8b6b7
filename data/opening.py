"""Opening files that others made: regular files alone, of bounded size, and JSON of the structure that is wanted."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable
from typing import Any, BinaryIO

LARGEST = 1 << 30  # bytes of one image, array or table in memory
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


def read_json(
    path: str | os.PathLike, accepted: str, fits: Callable[[Any], bool] = lambda content: isinstance(content, dict)
) -> Any:
    """The content of a JSON file in UTF-8.

    Args:
        path: the file.
        accepted: what the file is to hold, for the message.
        fits: whether a content has that structure; by default whether it is an object.
    Raises:
        ValueError: the file cannot be read, is no JSON, or has another structure.
    """
    try:
        with open_regular(path) as file:
            text = file.read().decode()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); accepted: {accepted}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not text in UTF-8; accepted: {accepted}") from None
    return parse_json(text, str(path), accepted, fits)


def parse_json(
    text: str, where: str, accepted: str, fits: Callable[[Any], bool] = lambda content: isinstance(content, dict)
) -> Any:
    """`read_json` of a text found in `where`."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"{where}: is not JSON ({reason}); accepted: {accepted}") from None
    if not fits(content):
        raise ValueError(f"{where}: holds {_shown(content)}; accepted: {accepted}")
    return content


def _shown(content: Any) -> str:
    if isinstance(content, dict):
        return f"an object with {', '.join(map(repr, list(content)[:4])) or 'nothing'} in it"
    if isinstance(content, list):
        return f"a list of {len(content)}"
    return repr(content)[:60] if content is not None else "null"
