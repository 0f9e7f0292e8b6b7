"""How the learning rate changes over a run."""

import math
from collections.abc import Callable


def _constant(step: int, total: int, warmup: int, reference: int) -> float:
    return 1.0


def _cosine(step: int, total: int, warmup: int, reference: int) -> float:
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def _inverse_sqrt(step: int, total: int, warmup: int, reference: int) -> float:
    return 1 / math.sqrt(max(1.0, step / reference))


DECAYS: dict[str, Callable[[int, int, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
}


def rate_factor(schedule: str, step: int, total: int, warmup: int, reference: int) -> float:
    """The fraction in [0, 1] of the learning rate that step k takes, the product of a warm-up and a decay:

        min(1, (k + 1) / warmup),    and  1 (constant),  (1 + cos πp) / 2 (cosine),  1/√max(1, k / reference)
        (inverse_sqrt, Karras et al. 2024),    with p = (k - warmup) / (total - warmup) in [0, 1].

    schedule: a name in `DECAYS`. step: k, 0 or more. total: steps of the run, at which cosine is 0.
    warmup: steps, 0 for none. reference: steps at the full rate before the root begins.
    Raises ValueError for another schedule.
    """
    if schedule not in DECAYS:
        raise ValueError(f"learning-rate schedule is {schedule!r}; accepted: {', '.join(DECAYS)}")
    return min(1.0, (step + 1) / max(warmup, 1)) * DECAYS[schedule](step, total, warmup, reference)
