"""Where encoded images are: a folder or a zip, read by name, in bounded memory."""

from __future__ import annotations

import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from data.opening import LARGEST, check_regular, open_regular, read_at_most

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_TEXTS = ("", ".csv", ".html", ".json", ".jsonl", ".md", ".txt", ".xml", ".yaml", ".yml")  # that come with images
_KINDS_SHOWN = 5
_FOLDER_OR_ZIP = "the path of a folder or a zip of images"
_log = logging.getLogger(__name__)


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
        self.names = _image_names(path, _walk(path))

    def open(self, i: int) -> BinaryIO:
        return open_regular(self.path / self.names[i])

    def signature(self, i: int) -> str:
        stat = (self.path / self.names[i]).stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"


class ZipSource:
    """Image files in a zip archive; names are the archive's."""

    def __init__(self, path: Path, field: str = "data.root_dir") -> None:
        self.path, self._field = path, field
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self.names = _image_names(path, self._open_archive().namelist())

    def _open_archive(self) -> zipfile.ZipFile:
        # A forked process shares the file position of its parent, hence one archive object per process.
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                check_regular(self.path)
                self._archive = os.getpid(), zipfile.ZipFile(self.path)
            except Exception as error:  # a damaged directory of an archive raises nearly anything
                raise ValueError(f"{self._field}: {self.path} is not a readable zip archive ({error})") from error
        return self._archive[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archive": None}

    def open(self, i: int) -> BinaryIO:
        archive = self._open_archive()
        member = archive.getinfo(self.names[i])
        if member.file_size > LARGEST:
            raise OSError(f"{member.file_size} bytes; accepted: at most {LARGEST}")
        return archive.open(member)

    def signature(self, i: int) -> str:
        info = self._open_archive().getinfo(self.names[i])
        return f"{info.file_size}-{info.CRC:08x}"


class FileSource:
    """One image file, whatever its name."""

    def __init__(self, path: Path) -> None:
        self.path, self.names = path, [path.name]

    def open(self, i: int) -> BinaryIO:
        return open_regular(self.path)

    def signature(self, i: int) -> str:
        stat = self.path.stat()
        return f"{stat.st_size}-{stat.st_mtime_ns}"


def open_source(root_dir: str | os.PathLike, field: str = "data.root_dir") -> FolderSource | ZipSource:
    """The images below a folder or in a zip; `field` is what a user calls it.

    Raises:
        ValueError: nothing there, neither folder nor zip, or no images in it.
    """
    path = existing_path(root_dir, field)
    source = FolderSource(path) if path.is_dir() else ZipSource(path, field)
    if not source.names:
        raise ValueError(f"{field}: no images in {path}; accepted: files ending in {' '.join(EXTENSIONS)}")
    return source


def existing_path(root_dir: str | os.PathLike, field: str = "data.root_dir", accepted: str = _FOLDER_OR_ZIP) -> Path:
    """`root_dir` as a path with ~ expanded; ValueError if it is empty or nothing is there."""
    if not str(root_dir):
        raise ValueError(f"{field}: empty; accepted: {accepted}")
    path = Path(root_dir).expanduser()
    if not path.exists():
        raise ValueError(f"{field}: {path} does not exist; accepted: {accepted}")
    return path


def is_image_name(name: str) -> bool:
    """Whether a relative path has an image's extension and is neither hidden nor Mac metadata."""
    return name.lower().endswith(EXTENSIONS) and not _is_hidden(name)


def stored_bytes(source: ImageSource, i: int) -> bytes:
    """The encoded image i.

    Raises:
        ValueError: when the file or the archive is damaged there, or holds more than `LARGEST` bytes.
    """
    try:
        with source.open(i) as stream:
            return read_at_most(stream)
    except MemoryError:
        raise
    except Exception as error:  # archives and databases raise nearly anything on damaged data
        raise ValueError(f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from error


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _image_names(path: Path, names: Iterable[str]) -> list[str]:
    """The names of images, sorted. What else there is, apart from texts, is counted in one line of the log."""
    images, others = [], Counter[str]()
    for name in names:
        if is_image_name(name):
            images.append(name)
        elif not name.endswith("/") and not _is_hidden(name):
            others[PurePosixPath(name).suffix.lower()] += 1
    for text in _TEXTS:
        del others[text]
    if others:
        kinds = [f"{count} {kind}" for kind, count in others.most_common(_KINDS_SHOWN)]
        more = ", …" if len(others) > _KINDS_SHOWN else ""
        _log.info("%s: left out %d files of formats that are not read (%s%s)", path, others.total(),
                  ", ".join(kinds), more)  # fmt: skip
    return sorted(images)


def _walk(root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        _log.warning("%s: left out the folder %s (%s)", root, error.filename, error.strerror)

    visited = set()  # linked folders may form cycles
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        yield from (Path(folder, file).relative_to(root).as_posix() for file in files)
