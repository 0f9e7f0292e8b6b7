"""What the log of a training run says of its speed and memory."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from data.opening import open_regular, parse_json

_ACCEPTED = "the log of a run"


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, in order.

    Raises:
        ValueError: when the run has none, or holds another one.
    """
    path = run / "metrics.jsonl"
    lines = []
    if path.exists():
        with open_regular(path) as file:
            for number, line in enumerate(file.read().splitlines(), 1):
                parsed = parse_json(line, dict, f"{path}, line {number}", _ACCEPTED)
                if not all(isinstance(parsed.get(name), int | float) for name in ("step", "images_per_second")):
                    raise ValueError(f"{path}, line {number}: holds no step and speed; accepted: {_ACCEPTED}")
                lines.append(parsed)
    if not lines:
        raise ValueError(f"{path}: holds no log line; accepted: a run of at least train.plot_graph_steps steps")
    return lines


def median_speed(lines: list[dict[str, Any]]) -> float:
    """Images per second: the median over the log lines, without the first, in which a run warms up."""
    return statistics.median(line["images_per_second"] for line in lines[1:] or lines)


def training_memory(lines: list[dict[str, Any]], pictures_every: int) -> float | None:
    """Largest GPU memory in GB before the first previews, whose full grids are no part of training.

    None for runs on a CPU, whose memory is not logged.
    """
    before = [line for line in lines if line["step"] < pictures_every] or lines[:1]
    return max((line["peak_memory_gb"] for line in before if "peak_memory_gb" in line), default=None)
