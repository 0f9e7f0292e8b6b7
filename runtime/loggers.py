"""Where metrics and previews go beside the run folder: TensorBoard, Weights & Biases, both or neither.

Both packages are optional, and imported only where they are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from configs.schema import RunConfig


class Logger(Protocol):
    """A place for metrics and previews of a run."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def image(self, path: Path, rows: list[str], step: int) -> None:
        """Show a PNG whose rows have these names."""

    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files in `<run folder>/tensorboard`; what a killed run logged past `step` is hidden."""

    def __init__(self, run: RunConfig, folder: Path, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, path: Path, rows: list[str], step: int) -> None:
        self._writer.add_image(", ".join(rows), pil_to_tensor(Image.open(path, formats=("PNG",))), step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A run of Weights & Biases with the name of this one, continued where it exists."""

    def __init__(self, run: RunConfig, folder: Path, config: dict[str, Any], step: int) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=run.name,
            name=run.experiment,
            id=run.experiment,
            resume="allow",
            mode="online" if run.wandb_mode == "disabled" else run.wandb_mode,
            dir=run.wandb_dir or str(folder),
            config=config,
            allow_val_change=True,
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def image(self, path: Path, rows: list[str], step: int) -> None:
        self._run.log({"previews": self._wandb.Image(str(path), caption=", ".join(rows))}, step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[RunConfig, Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def wanted_loggers(run: RunConfig) -> list[str]:
    """The loggers that run.logger names, and wandb where run.wandb_mode asks for it.

    Raises:
        ValueError: for an unknown name, or one whose package is not installed.
    """
    named = [] if run.logger == "none" else run.logger.split(",")
    if not set(named) <= LOGGERS.keys():
        raise ValueError(
            f"run.logger is {run.logger!r}; accepted: none, {', '.join(LOGGERS)}, or several joined by commas"
        )
    faults = {name: f"run.logger is {run.logger!r}" for name in named}
    if run.wandb_mode != "disabled":
        faults.setdefault("wandb", f"run.wandb_mode is {run.wandb_mode!r}")
    for name, fault in faults.items():
        try:
            importlib.import_module(name)
        except ImportError:
            raise ValueError(f"{fault}; accepted: what does without {name}, or pip install {name}") from None
    return list(faults)
