"""Disks that are full or read only: one line and status 2, what was there stays, and a second try makes it whole."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import forked
from faults.world import Attempt, World, chance_of, said, turns, world

_COMMANDS = ("stage one", "stage two", "encoding", "sampling", "scoring", "saving", "stage one, continued",
             "reconstructing", "averaging", "importing", "neighbours", "preparing", "conditioning")  # fmt: skip
_FULL, _SPACE, _READ_ONLY = 26, 26, 13
_MOUNT = ("mount", "-t", "tmpfs", "-o")


def attempts(scratch: Path, seed: int) -> Iterator[Attempt]:
    number = -1
    for number, command in turns(_COMMANDS, _FULL):
        yield f"no file may grow, {command}", partial(full, scratch, command, seed, number)
    for _, command in turns(_COMMANDS, _READ_ONLY):
        number += 1
        yield f"read only, {command}", partial(read_only, scratch, command, seed, number)
    for _, command in turns(_COMMANDS, _SPACE if _may_mount(scratch) else 0):
        number += 1
        yield f"no space left, {command}", partial(no_space, scratch, command, seed, number)


def full(scratch: Path, command: str, seed: int, number: int) -> str:
    """No file may be longer than some bytes, up to the length of the longest that the command writes."""
    here, chance = world(scratch), chance_of(seed, "disks", number)
    largest = max(map(len, here.added(command).values()))
    here.fresh()
    limit = chance.choice((0, chance.randrange(4096), chance.randrange(largest)))
    return _ended(here, command, forked.start(here.command(command), largest=limit).wait(), 0, 2)


def read_only(scratch: Path, command: str, seed: int, number: int) -> str:
    """One of the folders in which the command writes, or all, cannot be written."""
    here, chance = world(scratch), chance_of(seed, "disks", number)
    added = here.added(command)
    here.fresh()
    there = sorted({next(p for p in (here.here / file).parents if p.exists()) for file in added})
    chosen = [here.here, *there] if chance.random() < 0.5 else [chance.choice(there)]
    modes = {folder: folder.stat().st_mode for folder in chosen}
    try:
        for folder in chosen:
            folder.chmod(0o555)
        done = forked.start(here.command(command), user=True).wait()
    finally:
        for folder, mode in modes.items():
            folder.chmod(mode)
    return _ended(here, command, done, 2)


def no_space(scratch: Path, command: str, seed: int, number: int) -> str:
    """On a file system with less room than the command needs."""
    here, chance = world(scratch), chance_of(seed, "disks", number)
    added = sum(4096 + len(content) for content in here.added(command).values())
    kept = scratch / "kept"
    here.fresh()
    here.here.rename(kept)
    here.here.mkdir()
    used = sum(4096 * (2 + path.stat().st_size // 4096) for path in kept.rglob("*"))
    size = used + chance.randrange(4096, added)
    subprocess.run([*_MOUNT, f"size={size}", "none", here.here], check=True)
    try:
        shutil.copytree(kept, here.here, dirs_exist_ok=True)
        done = forked.run(here.command(command))
        fault = said(done, 0, 2) or here.damage(command)
        shutil.rmtree(kept)
        shutil.copytree(here.here, kept)
    finally:
        subprocess.run(["umount", "--lazy", here.here], check=True)
        here.here.rmdir()
        kept.rename(here.here)
    return fault or here.finish(command)


def _ended(here: World, command: str, done: subprocess.CompletedProcess, *statuses: int) -> str:
    return said(done, *statuses) or here.damage(command) or here.finish(command)


def _may_mount(scratch: Path) -> bool:
    """Whether this user may make a file system, as root may."""
    place = scratch / "mounted"
    place.mkdir(exist_ok=True)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.run([*_MOUNT, "size=64k", "none", place], check=True, capture_output=True)
        subprocess.run(["umount", place], check=True)
        return True
    return False
