"""The same command twice at once: the second is refused, or both end well, and what they leave is as of one."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import forked
from faults.world import COMMANDS, Attempt, chance_of, said, world

_TIMES = 2
_REASONS = ("in use by process", "exists; accepted", "holds something already")  # the last of what is written once


def attempts(scratch: Path, seed: int) -> Iterator[Attempt]:
    for number in range(_TIMES * len(COMMANDS)):
        command = list(COMMANDS)[number // _TIMES]
        yield command, partial(together, scratch, command, seed, number)


def together(scratch: Path, command: str, seed: int, number: int) -> str:
    """The second comes and ends while the first is stopped at a random moment."""
    here, chance = world(scratch), chance_of(seed, "pairs", number)
    end, duration = here.undisturbed(command)
    here.fresh()
    first = forked.start(here.command(command))
    time.sleep(chance.uniform(0, duration))
    os.kill(first.pid, signal.SIGSTOP)
    second = forked.run(here.command(command))
    os.kill(first.pid, signal.SIGCONT)
    done = first.wait()
    for told in (done, second):
        if told.returncode == 2 and not any(reason in told.stderr for reason in _REASONS):
            return f"refused for another reason: {told.stderr[-300:]}"
    fault = said(done, 0, 2) or said(second, 0, 2) or here.difference(end)
    return "both were refused" if done.returncode == second.returncode == 2 else fault
