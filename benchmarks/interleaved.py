"""Times of several ways to do the same, taken in turns in one process, so that drifts of the machine hit all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

_PATIENCE = 20.0  # seconds after which a slow way is not repeated further
_FEWEST = 3


class Timing(NamedTuple):
    """Median and quartiles in milliseconds, over so many repeats."""

    ms: float
    low: float
    high: float
    repeats: int


def interleaved(
    calls: Mapping[str, Callable[[int], object]], device: torch.device, repeats: int, warmup: int = 3
) -> dict[str, Timing]:
    """Time every call, `repeats` times after `warmup`; calls get a running number, by which they may choose inputs.

    A call that has taken 20 seconds in all is not repeated beyond the third time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-warmup, repeats):
        for name, call in calls.items():
            spent = times[name]
            if len(spent) >= _FEWEST and sum(spent) > _PATIENCE * 1e3:
                continue
            ms = _milliseconds(call, number % max(repeats, 1), device)
            if number >= 0 or ms > _PATIENCE * 1e3 / 10:  # a warm-up that took seconds is measurement enough
                spent.append(ms)
    return {name: _summary(spent) for name, spent in times.items()}


def _milliseconds(call: Callable[[int], object], number: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call(number)
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call(number)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def _summary(spent: list[float]) -> Timing:
    low, _, high = statistics.quantiles(spent, n=4) if len(spent) > 1 else spent * 3
    return Timing(statistics.median(spent), low, high, len(spent))
