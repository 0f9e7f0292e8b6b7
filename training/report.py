"""What a training run tells people: at its start, in its log lines, and at its end."""

import logging
import time
from pathlib import Path

from configs.schema import TrainConfig
from runtime.command import Command, shell_line
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


def next_of_stage_one(command: Command) -> str:
    """The command that trains stage two on the run of this one."""
    image = command.configs["config"]
    latent = command.place("config", "config", f"{image.run.experiment}_sampler")
    latent[0] = f"--config={_latent_file(Path(command.file('config')))}"
    return shell_line("train_latent_diffusion.py", *latent, *command.place("config", "decoder_config"))


def next_of_stage_two(command: Command, decoder_weights: str = "newest") -> str:
    """The command that draws samples from both runs; decoder_weights: of the autoencoder, whose latents were learnt."""
    places = [*command.place("config", "config"), *command.place("decoder_config", "decoder_config")]
    which = [] if decoder_weights == "newest" else [f"--decoder_run_weights={decoder_weights}"]
    return shell_line("experiments/generate_samples.py", *places, *which, "--num_samples=16")


def _latent_file(image_file: Path) -> Path:
    """The configuration of stage two that goes with one of stage one: of the same name, or of the same data."""
    stem = image_file.name.removesuffix("_config.py")
    files = [image_file.with_name(f"{name}_latent_config.py") for name in (stem, stem.split("_")[0], "ffhq")]
    return next((file for file in files if file.is_file()), Path("configs/ffhq_latent_config.py"))


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
