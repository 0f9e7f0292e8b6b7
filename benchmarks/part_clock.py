"""Where the time of a training step goes: a clock that gives every instant of the step to exactly one part.

Nothing is measured in isolation and nothing is counted twice: the times of the parts add up to the step they were
taken from. On a GPU instants are CUDA events in the stream, so a part lasts until the device has done its work, and
waits for the host are charged to the part they fall into.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

FORWARD, BACKWARD = "forward", "backward"


class Part(NamedTuple):
    """A row of the result, and the direction of its work; what has no gradient is "forward" throughout."""

    name: str
    direction: str = FORWARD


OUTSIDE = Part("rest of the step")


class PartClock:
    """Splits the time between `begin` and `end`. Parts nest: an inner one interrupts the one around it.

    device: on which the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.network = ""  # the one being evaluated, for the names of parts that several networks share
        self._open: list[Part] = []
        self._changes: list[tuple[Any, Part]] = []  # (instant, part that goes on from there)

    def begin(self) -> None:
        """Start with an idle device, outside of all parts."""
        self._synchronise()
        self._open = [OUTSIDE]
        self._changes = [(self._now(), OUTSIDE)]

    def enter(self, part: Part) -> None:
        self._open.append(part)
        self._changes.append((self._now(), part))

    def leave(self, part: Part) -> None:
        """Go back to the part around this one. Raises RuntimeError when `part` is not the innermost."""
        self._require_innermost(part)
        self._open.pop()
        self._changes.append((self._now(), self._open[-1]))

    def end(self) -> dict[Part, float]:
        """Milliseconds of every part since `begin`. Raises RuntimeError when a part was not left."""
        self._require_innermost(OUTSIDE)
        last = self._now()
        self._synchronise()
        instants = [instant for instant, _ in self._changes[1:]] + [last]
        spent: dict[Part, float] = defaultdict(float)
        for (start, part), stop in zip(self._changes, instants):
            spent[part] += start.elapsed_time(stop) if self.device.type == "cuda" else (stop - start) / 1e6
        return dict(spent)

    def _require_innermost(self, part: Part) -> None:
        if self._open[-1] != part:
            raise RuntimeError(
                f"the clock is in {self._open[-1]} where {part} was to end: autograd did not retrace the forward pass, "
                "or an input of a part needs no gradient"
            )

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, name: str, call: Callable) -> Callable:
        """`call` as a part of the forward pass alone. "{}" in the name stands for the network being evaluated."""

        def part_of_forward(*args: Any, **kwargs: Any) -> Any:
            part = Part(name.format(self.network))
            self.enter(part)
            out = call(*args, **kwargs)
            self.leave(part)
            return out

        return part_of_forward

    def timed_both_ways(self, name: str, call: Callable) -> Callable:
        """`call` as a part of both passes; its first argument and its result are tensors with a gradient.

        Autograd runs what is ready latest-created first, so that the nodes made inside `call` run between that of its
        result and that of its first argument, which mark the part.
        """

        def part_of_both(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            forward = Part(name.format(self.network))
            backward = Part(forward.name, BACKWARD)
            self.enter(forward)
            x = _Mark.apply(x, lambda: self.leave(backward))
            out = _Mark.apply(call(x, *args, **kwargs), lambda: self.enter(backward))
            self.leave(forward)
            return out

        return part_of_both

    def within(self, network: str, call: Callable) -> Callable:
        """`call` as the evaluation of a network."""

        def named(*args: Any, **kwargs: Any) -> Any:
            self.network = network
            out = call(*args, **kwargs)
            self.network = ""
            return out

        return named


class _Mark(torch.autograd.Function):
    """The identity, which runs `when_reached` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, when_reached: Callable[[], None]) -> torch.Tensor:
        ctx.when_reached = when_reached
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.when_reached()
        return gradient, None
