"""The lock of a folder: held by one process, dropped however that ends."""

import os
import signal
import socket
import time

import pytest

from runtime.lock import FolderLock


def held_by_child(folder) -> int:
    """Fork a process that holds the lock until it is killed, and wait until it does."""
    child = os.fork()
    if not child:
        try:
            with FolderLock(folder):
                signal.pause()
        finally:
            os._exit(1)
    deadline = time.monotonic() + 10
    while not ((folder / ".lock").exists() and (folder / ".lock").stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    return child


def test_the_second_is_told_of_the_first_and_a_kill_leaves_no_lock(tmp_path):
    folder = tmp_path / "made" / "here"
    child = held_by_child(folder)
    with pytest.raises(ValueError, match=f"here: in use by process {child} on {socket.gethostname()}, since 20"):
        FolderLock(folder).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with FolderLock(folder):
        assert f"process {os.getpid()} " in (folder / ".lock").read_text()
    assert not list(folder.iterdir())


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    with FolderLock(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with FolderLock(tmp_path), pytest.raises(ValueError, match="in use"):
            FolderLock(tmp_path).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_child_that_leaves_the_block_drops_nothing(tmp_path):
    with FolderLock(tmp_path) as lock:
        child = os.fork()
        if not child:
            lock.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ValueError, match="in use"):
            FolderLock(tmp_path).__enter__()
    with FolderLock(tmp_path):
        pass
