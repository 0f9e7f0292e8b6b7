"""Where encoded images are: a folder, a zip or tar archives, read by name, in bounded memory."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from data.names import EXTENSIONS, image_names, is_image_name
from data.opening import LARGEST, check_regular, open_regular, read_at_most, size_and_end
from data.tars import TarSource, is_pattern, is_tar, matching, tars_in

_ACCEPTED = "the path of a folder, zip or tar of images"
_log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """Encoded images in the order of their sorted names; usable from threads and from forked processes."""

    path: Path
    names: list[str]

    def open(self, i: int) -> BinaryIO:
        """Seekable bytes of image i."""

    def signature(self, i: int) -> str:
        """What says that the stored bytes are the same, wherever and since whenever they lie there."""


class FolderSource:
    """Image files below a folder, linked folders included; names are relative paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = image_names(path, _walk(path))

    def open(self, i: int) -> BinaryIO:
        return open_regular(self.path / self.names[i])

    def signature(self, i: int) -> str:
        return size_and_end(self.open(i))

    def beside(self, name: str) -> BinaryIO | None:
        """What lies beside the images under a name, None where nothing does."""
        return open_regular(self.path / name) if (self.path / name).exists() else None


class ZipSource:
    """Image files in a zip archive; names are the archive's."""

    def __init__(self, path: Path, field: str = "data.root_dir") -> None:
        self.path, self._field = path, field
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        self.names = image_names(path, self._open_archive().namelist())

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
        return self._member(self.names[i])

    def beside(self, name: str) -> BinaryIO | None:
        """As of a folder."""
        return self._member(name) if name in self._open_archive().NameToInfo else None

    def _member(self, name: str) -> BinaryIO:
        archive = self._open_archive()
        member = archive.getinfo(name)
        if member.file_size > LARGEST:
            raise OSError(f"{member.file_size} bytes; accepted: at most {LARGEST}")
        return cast(BinaryIO, archive.open(member))

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
        return size_and_end(self.open(i))


def open_source(root_dir: str | os.PathLike, field: str = "data.root_dir") -> FolderSource | ZipSource | TarSource:
    """The images below a folder, in a zip, in a tar, or in tars: all of a folder without images, or of a pattern.

    Args:
        root_dir: the path, or a pattern as `matching` takes it.
        field: what a user calls it.
    Raises:
        ValueError: nothing there, another kind of file, or no images in it.
    """
    path = existing_path(root_dir, field)
    source = _opened(path, field)
    if not source.names:
        raise ValueError(f"{field}: no images in {path}; accepted: files ending in {' '.join(EXTENSIONS)}")
    return source


def _opened(path: Path, field: str) -> FolderSource | ZipSource | TarSource:
    if not path.exists():
        return TarSource(path, matching(path, field), field)
    if path.is_dir():
        shards = tars_in(path)
        return (
            FolderSource(path) if not shards or any(map(is_image_name, _walk(path))) else TarSource(path, shards, field)
        )
    return TarSource(path, [path], field) if is_tar(path) else ZipSource(path, field)


def existing_path(root_dir: str | os.PathLike, field: str = "data.root_dir", accepted: str = _ACCEPTED) -> Path:
    """`root_dir` as a path with ~ expanded; ValueError if it is empty or nothing is there and it is no pattern."""
    if not str(root_dir):
        raise ValueError(f"{field}: empty; accepted: {accepted}")
    path = Path(root_dir).expanduser()
    if not path.exists() and not is_pattern(path):
        raise ValueError(f"{field}: {path} does not exist; accepted: {accepted}")
    return path


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
