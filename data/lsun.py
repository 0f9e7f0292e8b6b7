"""Reader of LSUN databases: an LMDB folder whose values are encoded images (webp or jpg)."""

from __future__ import annotations

import io
import os
import struct
import weakref
from pathlib import Path
from typing import BinaryIO, ClassVar

from data.opening import open_regular, size_and_end

DATABASE_FILE = "data.mdb"
_MAGIC = 0xBEEFC0DE
_META = struct.Struct("=16xIIQQI92xQQ")  # magic, version, address, map size, page size, last page, transaction


class LsunSource:
    """Encoded images of an LMDB folder in the order of their keys (an `ImageSource`).

    Raises:
        ValueError: the package lmdb is missing, or the folder is not a readable database, or it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = _Database.shared(path)
        try:
            with self._database.begin() as transaction:
                self._keys = sorted(bytes(key) for key in transaction.cursor().iternext(keys=True, values=False))
        except Exception as error:  # the package lmdb, and so the class of its errors, is optional
            raise ValueError(f"data.root_dir: {path} is not a readable LMDB ({error})") from error
        self.names = [key.decode("ascii", "backslashreplace") for key in self._keys]
        if not self._keys:
            raise ValueError(f"data.root_dir: the LMDB {path} holds no images")

    def __getstate__(self) -> dict:
        return {"path": self.path, "names": self.names, "_keys": self._keys}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _database=_Database.shared(state["path"]))

    def open(self, i: int) -> BinaryIO:
        with self._database.begin() as transaction:
            return io.BytesIO(transaction.get(self._keys[i]))

    def signature(self, i: int) -> str:
        return size_and_end(self.open(i))


class _Database:
    """An environment opened once per process: LMDB refuses a second one, and forks must not use their parent's."""

    _open: ClassVar[weakref.WeakValueDictionary[str, _Database]] = weakref.WeakValueDictionary()

    def __init__(self, path: str) -> None:
        self._path = path
        self._environment = _open_environment(path)
        self._process = os.getpid()

    @classmethod
    def shared(cls, path: Path) -> _Database:
        key = os.path.realpath(path)
        database = cls._open.get(key)
        if database is None:
            database = cls._open[key] = cls(key)
        return database

    def begin(self):
        if self._process != os.getpid():
            self._environment.close()  # the child's copy only
            self._environment, self._process = _open_environment(self._path), os.getpid()
        return self._environment.begin()


def _open_environment(path: str):
    try:
        import lmdb
    except ImportError as error:
        raise ValueError("data.root_dir: LSUN databases need the package lmdb: pip install lmdb") from error
    try:
        _check_size(Path(path) / DATABASE_FILE)
        return lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False, create=False)
    except (lmdb.Error, OSError) as error:
        raise ValueError(f"data.root_dir: {path} is not a readable LMDB ({error})") from error


def _check_size(file: Path) -> None:
    """Raise OSError where a database is shorter than it says: what is mapped beyond the end of a file kills a process.

    A page begins with a header of 16 bytes. The first two hold, each as of another transaction: a magic number, the
    version, an address, the size of the map, two trees of 48 bytes, of which the first begins with the size of a page,
    then the last page in use and the number of the transaction.
    """
    with open_regular(file, largest=1 << 62) as stream:
        size = os.fstat(stream.fileno()).st_size
        pages: list[tuple[int, ...]] = []
        for _ in range(2):
            stream.seek(pages[0][4] if pages else 0)  # the second page lies where the first one ends
            page = stream.read(_META.size)
            if len(page) < _META.size:
                raise OSError(f"it is cut short, at {size} bytes")
            pages.append(_META.unpack(page))
            if pages[-1][0] != _MAGIC:
                return  # another kind of file, or of another byte order, which LMDB itself refuses
    newest = max(pages, key=lambda page: page[6])
    needed = (newest[5] + 1) * newest[4]
    if size < needed:
        raise OSError(f"it is cut short: {size} bytes, of {needed}")


def is_lmdb(path: Path) -> bool:
    """Whether the folder holds an LMDB."""
    return (path / DATABASE_FILE).is_file()
