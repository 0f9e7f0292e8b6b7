"""How the learning rate changes over a run."""

import math

from configs.schema import RATE_SCHEDULES


def rate_factor(schedule: str, step: int, total: int, warmup: int, reference: int) -> float:
    """The fraction in [0, 1] of the learning rate that step k takes, the product of a warm-up and a decay:

        min(1, (k + 1) / warmup),    and  1 (constant),  (1 + cos πp) / 2 (cosine),  1/√max(1, k / reference)
        (inverse_sqrt, Karras et al. 2024),    with p = (k - warmup) / (total - warmup) in [0, 1].

    schedule: a name in `RATE_SCHEDULES`. step: k, 0 or more. total: steps of the run, at which cosine is 0.
    warmup: steps, 0 for none. reference: steps at the full rate before the root begins.
    Raises ValueError for another schedule.
    """
    warm = min(1.0, (step + 1) / max(warmup, 1))
    if schedule == "constant":
        return warm
    if schedule == "cosine":
        progress = (step - warmup) / max(total - warmup, 1)
        return warm * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    if schedule == "inverse_sqrt":
        return warm / math.sqrt(max(1.0, step / reference))
    raise ValueError(f"learning-rate schedule is {schedule!r}; accepted: {', '.join(RATE_SCHEDULES)}")
