"""Commands that are killed at a random moment, given again, and then leave what they leave undisturbed."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import forked
from faults.world import ONCE, Attempt, chance_of, turns, world

COUNT = 78
_COMMANDS = ("stage one", "stage two", "encoding", "sampling", "scoring", "saving", "stage one, continued",
             "stage one on files", "reconstructing", "averaging", "importing",
             "preparing", "conditioning")  # fmt: skip


def attempts(scratch: Path, seed: int) -> Iterator[Attempt]:
    for number, command in turns(_COMMANDS, COUNT):
        yield command, partial(killed, scratch, command, seed, number)


def killed(scratch: Path, command: str, seed: int, number: int) -> str:
    """Kill it once or, every third time, again while it makes up for that."""
    here, chance = world(scratch), chance_of(seed, "kills", number)
    duration = here.undisturbed(command)[1]
    here.fresh()
    for _ in range(1 + (number % 3 == 0)):
        started = forked.start(here.command(command))
        time.sleep(chance.uniform(0, duration))
        os.kill(started.pid, signal.SIGKILL)
        done = started.wait()
        if done.returncode not in (0, -signal.SIGKILL) or "Traceback" in done.stderr:
            return f"status {done.returncode}: {done.stderr[-500:]}"
        if lost := here.damage(command):
            return f"after a kill: {lost}"
        if done.returncode == 0 and command in ONCE:
            break
    return here.finish(command)
