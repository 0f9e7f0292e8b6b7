"""What a training run tells people: at its start, in its log lines, and at its end."""

import logging
import time

from configs.schema import TrainConfig
from runtime.run_dir import RunDir
from runtime.stored import WEIGHTS
from training.stage import Stage

log = logging.getLogger(__name__)


def announce(run_dir: RunDir, stage: Stage, train: TrainConfig, device: str, step: int) -> None:
    """Say where, on what and from where a run trains, in one line each."""
    parameters = {name: sum(p.numel() for p in module.parameters()) for name, module in stage.modules.items()}
    each = ", ".join(f"{name} {count:,}" for name, count in parameters.items())
    lines: dict[str, object] = {
        "folder": run_dir.path,
        "device": device,
        "data": ", ".join(f"{count:,} {name}" for name, count in stage.examples.items()),
        "parameters": f"{sum(parameters.values()):,}" + (f" ({each})" if len(parameters) > 1 else ""),
        "steps": f"{train.steps:,} of {train.batch_size} examples",
        "begins": f"at step {step:,}, from its newest checkpoint" if step else "at step 0",
    }
    _tell(lines)


def conclude(run_dir: RunDir, step: int, next_command: str) -> None:
    """Say where the results are, and how to go on."""
    lines: dict[str, object] = {
        "trained": f"up to step {step:,}",
        "weights": run_dir.path / WEIGHTS,
        "previews": run_dir.previews,
        "next": next_command,
    }
    _tell({name: value for name, value in lines.items() if value})


def _tell(lines: dict[str, object]) -> None:
    for name, value in lines.items():
        log.info("%-11s %s", name, value)


class Clock:
    """The speed of training since the last reading, without what is done between steps, and the time left by it."""

    def __init__(self, step: int, steps: int) -> None:
        self._steps = steps
        self.restart(step)

    def restart(self, step: int) -> None:
        self._since, self._step = time.perf_counter(), step

    def steps_per_second(self, step: int) -> float:
        return (step - self._step) / (time.perf_counter() - self._since)

    def time_left(self, step: int, speed: float) -> str:
        """Hours, minutes and seconds that the remaining steps take at `speed` steps per second, e.g. "1:02:03"."""
        seconds = round((self._steps - step) / speed)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
