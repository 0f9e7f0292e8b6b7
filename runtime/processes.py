"""The processes of one command under torchrun: who they are, what they agree on, and how they end together.

What they exchange here goes from host to host (gloo), never through a GPU. Every exchange begins with the same small
reduction, `agree`, so a process that meets a fault can tell the others whatever they are about to exchange.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_FAULT = 1 << 30  # above every number that processes agree on
# One process may wait for the previews or samples of another however long they take; should one end, torchrun ends all.
_TIMEOUT = timedelta(days=7)
_PATIENCE = timedelta(minutes=10)  # of a process with a fault, until the others listen


@dataclass(frozen=True)
class Processes:
    """This process among those of the command; by default the only one, for which nothing below communicates.

    rank: its number, 0 … world_size − 1. local_rank: its number on this machine, which is that of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> Processes:
        """Read what torchrun says; a process that it did not start is the only one.

        Raises:
            ValueError: when a variable is missing beside the others, or holds no number in its range.
        """
        given = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        if not given:
            return cls()
        for name in _VARIABLES:
            if not given.get(name, "").isdecimal():
                raise ValueError(
                    f"{name} is {given.get(name, '')!r}; accepted: {', '.join(_VARIABLES)} as torchrun sets them, or "
                    "none of them"
                )
        rank, world_size, local_rank = (int(given[name]) for name in _VARIABLES)
        if not local_rank <= rank < world_size:
            raise ValueError(
                f"RANK, WORLD_SIZE, LOCAL_RANK is {rank}, {world_size}, {local_rank}; accepted: LOCAL_RANK <= RANK < "
                "WORLD_SIZE, as torchrun sets them"
            )
        return cls(rank, world_size, local_rank)

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Connect the processes, by the address that torchrun gives, while a command runs."""
        if self.world_size == 1:
            yield
            return
        dist.init_process_group("gloo", timeout=_TIMEOUT)
        try:
            yield
        except SystemExit:  # of all processes; after any other exception of one, ending in order could wait for ever
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()

    def agree(self, number: int = 0) -> int:
        """Wait for all processes and return the largest of their numbers, or leave with those that met a fault."""
        if self.world_size == 1:
            return number
        try:
            agreed = _largest(number, _TIMEOUT)
        except RuntimeError as error:
            _leave_alone([f"lost the others: {' '.join(str(error).split())}"], 1)
        if agreed == _FAULT:
            _leave_together([], 0)
        return agreed

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank; they must pickle."""
        if self.world_size == 1:
            return [value]
        self.agree()
        return _gathered(value)

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """What `make` returns, called by rank 0 alone; it must pickle."""
        if self.world_size == 1:
            return make()
        made: list[Any] = [make() if self.is_rank_0 else None]
        self.agree()
        dist.broadcast_object_list(made)
        return made[0]


ALONE = Processes()


def leave(faults: list[str], status: int = 2) -> NoReturn:
    """Print one line per fault on standard error and exit with `status`.

    Connected processes exit together, with the largest status. Rank 0 prints its own faults, and of others what it
    did not meet itself; should they not come, as when one waits for this process inside a step, it leaves alone.
    """
    if dist.is_available() and dist.is_initialized():
        try:
            _largest(_FAULT, _PATIENCE)
        except RuntimeError:
            _leave_alone(faults, status)
        _leave_together(faults, status)
    _print(faults)
    sys.exit(status)


def _leave_alone(faults: list[str], status: int) -> NoReturn:
    """Leave at once: an orderly end would wait for the others, who do not come."""
    _print([f"process {dist.get_rank()}: {fault}" for fault in faults])
    os._exit(status)


def _leave_together(faults: list[str], status: int) -> NoReturn:
    everyones, statuses = zip(*_gathered((faults, status)))
    lines = {fault: fault for fault in everyones[0]}
    for rank, others in enumerate(everyones):
        for fault in others:
            lines.setdefault(fault, f"process {rank}: {fault}")
    _print([] if dist.get_rank() else list(lines.values()))
    dist.barrier()  # torchrun ends the others once one has left, so the first must have printed by then
    sys.exit(max(statuses))


def _print(faults: list[str]) -> None:
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr, flush=True)


def _largest(number: int, timeout: timedelta) -> int:
    """The largest number of all processes; RuntimeError when one is lost, or does not come in time."""
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True).wait(timeout)
    return int(largest)


def _gathered(value: T) -> list[T]:
    everyones: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(everyones, value)
    return everyones
