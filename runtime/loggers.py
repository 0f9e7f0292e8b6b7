"""Where metrics and previews go beside the run folder: TensorBoard, Weights & Biases, both or neither.

Both packages are optional, and imported only where they are asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from configs.schema import RunConfig
from runtime.files import write_atomic


class Logger(Protocol):
    """A place for metrics and previews of a run."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...

    def image(self, path: Path, rows: list[str], step: int) -> None:
        """Show a PNG whose rows have these names."""

    def close(self) -> None: ...


_ID = "wandb_id.txt"  # in the folder of a run: its id, which no run elsewhere has
_FORBIDDEN, _LONGEST_PROJECT = "/\\#?%:", 128  # in the name of a project


def _mode(run: RunConfig) -> str:
    return "online" if run.wandb_mode == "disabled" else run.wandb_mode


@contextlib.contextmanager
def _readable(said: str, accepted: str = "run.wandb_mode=offline") -> Iterator[None]:
    """Turn an error of wandb, whose classes differ between versions, into a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{said} ({' '.join(str(error).split())}); accepted: {accepted}") from error


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
    """A run of Weights & Biases with the name of this one, continued where the folder says that it exists."""

    def __init__(self, run: RunConfig, folder: Path, config: dict[str, Any], step: int) -> None:
        self._wandb = importlib.import_module("wandb")
        kept = folder / _ID
        name = kept.read_text().strip() if kept.exists() else ""
        name = name or f"{re.sub('[^A-Za-z0-9_-]+', '-', run.experiment)[:64]}-{secrets.token_hex(4)}"
        folder.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere if its folder is not there
        with _readable("Weights & Biases refuses the run"):
            self._run = self._wandb.init(
                project=run.name,
                name=run.experiment,
                id=name,
                resume="allow",
                mode=_mode(run),
                dir=run.wandb_dir or str(folder),
                config=config,
                allow_val_change=True,
            )
        write_atomic(kept, lambda temporary: temporary.write_text(f"{name}\n"))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._run.log(metrics, step=step)

    def image(self, path: Path, rows: list[str], step: int) -> None:
        self._run.log({"previews": self._wandb.Image(str(path), caption=", ".join(rows))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _check_wandb(run: RunConfig) -> None:
    """Raise ValueError for what wandb would refuse once training has begun."""
    name = run.name
    if not 0 < len(name) <= _LONGEST_PROJECT or not name.isprintable() or set(name) & set(_FORBIDDEN):
        raise ValueError(
            f"run.name is {name!r}; accepted by wandb: up to {_LONGEST_PROJECT} characters without {_FORBIDDEN}"
        )
    if run.wandb_dir and not Path(run.wandb_dir).is_dir():
        raise ValueError(f"run.wandb_dir is {run.wandb_dir!r}; accepted: a folder that exists, or none")
    if _mode(run) == "online":
        with _readable("wandb is not logged in", "after `wandb login`, or with run.wandb_mode=offline"):
            if not importlib.import_module("wandb").login():
                raise ValueError("no key is known")


LOGGERS: dict[str, Callable[[RunConfig, Path, dict[str, Any], int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def wanted_loggers(run: RunConfig) -> list[str]:
    """The loggers that run.logger names, and wandb where run.wandb_mode asks for it.

    Raises:
        ValueError: for an unknown name, one whose package is not installed, or a run that wandb would refuse.
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
    if "wandb" in faults:
        _check_wandb(run)
    return sorted(faults, reverse=True)  # wandb first, which may refuse the run
