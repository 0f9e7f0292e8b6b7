"""Atomic writing, and JSON: a reader sees the old file or the new one, never a part."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's mask has it; some writers make files private
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


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
