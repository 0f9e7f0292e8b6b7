"""Commands that get a signal, or whose reader of images dies, at a random moment; given again, they make up for it."""

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import forked
from faults.world import Attempt, World, chance_of, log_fault, said, turns, world

COUNT = 48
_COMMANDS = ("stage one", "stage two", "encoding", "sampling", "scoring", "saving", "stage one on files",
             "reconstructing")  # fmt: skip
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_READERS = 8  # attempts in which one dies


def attempts(scratch: Path, seed: int) -> Iterator[Attempt]:
    for number, command in turns(_COMMANDS, COUNT):
        sent = _SIGNALS[number // len(_COMMANDS) % len(_SIGNALS)]
        yield f"{sent.name} to {command}", partial(stopped, scratch, command, sent, seed, number)
    for number in range(COUNT, COUNT + _READERS):
        yield "death of a reader of stage one on files", partial(bereft, scratch, seed, number)


def stopped(scratch: Path, command: str, sent: signal.Signals, seed: int, number: int) -> str:
    here, chance = world(scratch), chance_of(seed, "signals", number)
    duration = here.undisturbed(command)[1]
    here.fresh()
    started = forked.start(here.command(command))
    time.sleep(chance.uniform(0, duration))
    os.kill(started.pid, sent)
    done = started.wait()
    ended = said(done, 0, -sent, 128 + sent)
    if done.returncode == 128 + sent and command.startswith("stage") and "stopped by signal" in done.stderr:
        if not any(here.runs.glob("*/checkpoints/step_*.pt")):
            ended = "no state is saved"
    return ended or here.damage(command) or here.finish(command)


def bereft(scratch: Path, seed: int, number: int) -> str:
    """Training whose reader is killed says so in one line, once its state is saved."""
    here, chance = world(scratch), chance_of(seed, "signals", number)
    command = "stage one on files"
    here.undisturbed(command)
    here.fresh()
    started = forked.start([*here.command(command), "--config.train.steps=100000"])
    log, deadline = here.runs / "files" / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    readers = [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in readers or [started.pid]:
        os.kill(int(pid), signal.SIGKILL)
    done = started.wait()
    return "no process reads images" if not readers else said(done, 2) or whole_log(here, done.stderr)


def whole_log(here: World, told: str) -> str:
    if "reads images died" not in told or "its state is saved" not in told:
        return f"it says {told[-300:]}"
    return log_fault(here.runs / "files")
