"""Atomic writing, and JSON: a reader sees the old file or the new one, never a part."""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_OWNED = re.compile(r"\..+\.([^.]+)\.(\d+)\.tmp")  # by which process of which machine
_FORGOTTEN = 24 * 3600  # seconds after which a temporary file of another machine counts as left behind
_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())


def temporary_of(path: Path) -> Path:
    """Where this process makes what is to be at `path`; `sweep` knows it as left behind once the process has ended."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


def write_atomic(path: Path, write: Callable[[Path], object], *, one_of_many: bool = False) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it to `path`.

    one_of_many: leave it to the caller to sweep the folder, once for all files; else what is left of `path` goes.

    Raises:
        OSError: naming `path`, when it cannot be written, as on a full disk; then what was there is as it was.
    """
    temporary = temporary_of(path)
    if not one_of_many:
        sweep(path.parent, glob.escape(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's mask has it; some writers make files private
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # libraries have exceptions of their own for a full disk
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def cannot_write(path: Path, error: Exception) -> OSError:
    """The error for people when `path` cannot be written."""
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return OSError(f"{path}: cannot be written ({reason})")


def sweep(folder: Path, names: str = "") -> None:
    """Remove from a folder the temporary files of processes that have ended.

    Of another machine's processes nothing is known; their files go a day after they were last written.

    Args:
        folder: of this project alone, if no `names` are given.
        names: pattern of what they would have become; then files and folders of this machine alone go.
    """
    for path in folder.glob(f".{names}.{_HOST}.*.tmp" if names else ".*.tmp"):
        with contextlib.suppress(OSError):
            if _left_behind(path):
                if names and path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _left_behind(path: Path) -> bool:
    owner = _OWNED.fullmatch(path.name)
    if owner is None or owner[1] != _HOST:
        return time.time() - path.stat().st_mtime > _FORGOTTEN
    try:
        os.kill(int(owner[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # alive, and of another user; or no number of a process
        return False
    return False


def present(path: Path) -> bool:
    """Whether there is something at `path`; OSError, never False, when that cannot be found out."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def to_json(content: Any, indent: int | None = None) -> str:
    """`content` as JSON; numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(_without_nan(content), indent=indent, allow_nan=False)


def plain(content: Any) -> Any:
    """`content` as it is read back from JSON: lists for tuples, keys that are text."""
    return json.loads(to_json(content))


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(to_json(content, indent=2) + "\n"))


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
