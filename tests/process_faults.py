"""Faults of one of several processes, each of which ends them all."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import micro
from runtime.command import readable_errors
from runtime.processes import Processes
from test_training import image_trainer
from training.prepare import prepare_image_run
from training.trainer import Trainer


def share(root: Path, processes: Processes) -> None:
    """Images that two processes cannot share."""
    image_trainer(root / "share", {"train.batch_size": 5}, processes).run()


def damaged(root: Path, processes: Processes) -> None:
    """An image of which only the header is good, which one process decodes for both."""
    folder = root / "damaged"
    if processes.is_rank_0:
        folder.mkdir()
        for i in range(3):
            Image.effect_noise((16, 16), 90).save(folder / f"{i}.png")
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-99])
    processes.agree()
    changes = {"data.name": "folder", "data.root_dir": str(folder), "data.val_ratio": 0.0, "data.channels": 1}
    prepare_image_run({"config": micro.image(root / "none", changes)}, processes)


def image(root: Path, processes: Processes) -> None:
    """A second batch that one process cannot read."""

    def damaged(seen: int) -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 3, 16, 12, dtype=torch.uint8)
        raise ValueError("17.png is damaged")

    trainer = image_trainer(root / "image", processes=processes)
    if not processes.is_rank_0:
        trainer.stage.batches = damaged
    trainer.run()


def overflowing(root: Path, processes: Processes, steps: range, changes: dict | None = None) -> Trainer:
    """A trainer whose loss overflows in the second process, in some steps."""
    trainer = image_trainer(root, changes, processes)
    plain = trainer.stage.loss

    def loss(*given) -> tuple:
        value, *rest = plain(*given)
        return value * (torch.inf if trainer.step in steps else 1.0), *rest

    if not processes.is_rank_0:
        trainer.stage.loss = loss
    return trainer


def loss(root: Path, processes: Processes) -> None:
    """A loss that overflows in one process, too often."""
    overflowing(root / "loss", processes, range(10), {"optimizer.max_nonfinite_steps": 2}).run()


def state(root: Path, processes: Processes) -> None:
    """A state that is not finite, which rank 0 alone writes."""
    trainer = image_trainer(root / "state", {"train.checkpoint_steps": 2}, processes)
    update = trainer.ema.update

    def broken() -> None:
        update()
        if trainer.step == 4:
            next(trainer.ema.modules["encoder"].parameters()).view(-1)[0] = torch.nan

    trainer.ema.update = broken
    trainer.run()


def outcome(fault: Callable[[Path, Processes], None], root: Path, processes: Processes) -> tuple[int, str]:
    """The status a process leaves with, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left, readable_errors():
        fault(root, processes)
    return left.value.code, "".join(line for line in said.getvalue().splitlines(True) if "error" in line)
