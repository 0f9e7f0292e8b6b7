"""One command at a time in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import TracebackType

_log = logging.getLogger(__name__)
_BUSY = (errno.EACCES, errno.EAGAIN)
_trying = False  # see `trial`
_held: set[int] = set()  # file descriptors of locks; a forked child closes its copies, so that it cannot outlive them


def _close_copies() -> None:
    for held in _held:
        with contextlib.suppress(OSError):
            os.close(held)
    _held.clear()


os.register_at_fork(after_in_child=_close_copies)


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Within it, locks are looked at and not taken, and `end_of_trial` ends the command: nothing is written."""
    global _trying
    _trying = True
    try:
        yield
    finally:
        _trying = False


def end_of_trial() -> None:
    """Say that a command has met no fault and is about to write: a trial ends here, with status 0."""
    if _trying:
        sys.exit(0)


class FolderLock:
    """`with FolderLock(folder): ...` keeps other processes that ask for the same lock out of a folder.

    The kernel holds the lock (flock) on `folder/.lock` and drops it when the process ends, killed or not. The file
    names the holder; one that a crash leaves behind locks nothing. Under torchrun rank 0 alone asks. Where the file
    system has no locks, a warning says so and nothing is locked.

    Args:
        folder: made on entry if need be.
    Raises:
        ValueError: on entry, when another process is in the folder; names its number, host and start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._path = folder, folder / ".lock"
        self._file: int | None = None

    def __enter__(self) -> FolderLock:
        if _trying:
            self.check()
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                if self._lock(file):
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)
        _held.add(self._file)
        return self

    def check(self) -> None:
        """Raise ValueError, as on entry, when another process is in the folder; nothing is made or locked."""
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            self._flock(file, fcntl.LOCK_SH)
        finally:
            os.close(file)

    def _flock(self, file: int, kind: int) -> bool:
        """Lock an open file; false where the file system has no locks, ValueError where another process holds it."""
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                holder = os.read(file, 500).decode(errors="replace").strip() or "another process"
                raise ValueError(
                    f"{self.folder}: in use by {holder}; accepted: another folder, or the same once that has ended"
                ) from None
            _log.warning("%s: no lock (%s), so nothing keeps a second command out", self.folder, error.strerror)
            return False
        return True

    def _lock(self, file: int) -> bool:
        """Lock an open file and write the holder into it; false if it was removed meanwhile."""
        if not self._flock(file, fcntl.LOCK_EX):
            return True
        try:
            if os.stat(self._path).st_ino != os.fstat(file).st_ino:
                return False
        except FileNotFoundError:
            return False
        os.ftruncate(file, 0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        file, self._file = self._file, None
        if file in _held:  # not in a forked child, whose copy is closed
            _held.discard(file)
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(file)
