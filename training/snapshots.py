"""Power-function averages of a run on disk, from which averages of other lengths are made after training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from configs.schema import TrainConfig
from runtime.checkpoint import save_weights
from runtime.stored import read_header
from training.ema import PowerAverages
from training.power_averages import combination, exponent

FOLDER = "averages"  # of a run
_NAME = re.compile(r"step_(\d{8})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A file of averages: the step it was taken at, how many updates the averages have seen, and their lengths."""

    path: Path
    step: int
    updates: int
    lengths: tuple[float, ...]


def _steps(folder: Path) -> list[int]:
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step_*.safetensors"))
    return sorted(int(name[1]) for name in names if name)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def save_snapshot(folder: Path, step: int, averages: PowerAverages, config: TrainConfig) -> None:
    """Write the averages of `step` atomically, if they have seen anything.

    While there are more than `ema_snapshots` files, only those at multiples of 2, 4, … times `ema_snapshot_steps` stay,
    and the newest one.

    Raises:
        FloatingPointError: when a tensor is not finite; then nothing is written.
    """
    if not averages.updates:
        return
    dtype, every = getattr(torch, config.ema_snapshot_dtype), config.ema_snapshot_steps
    tensors = {
        f"{i}.{name}": value.to(dtype) for i, values in enumerate(averages.values) for name, value in values.items()
    }
    known = {"updates": averages.updates, "origin": averages.origin, "lengths": averages.lengths}
    save_weights(_path(folder, step), tensors, {"step": step, **known})
    while len(steps := _steps(folder)) > config.ema_snapshots and every <= step:
        every *= 2
        for old in steps[:-1]:
            if old % every:
                _path(folder, old).unlink(missing_ok=True)


def drop_snapshots(folder: Path, after: int) -> None:
    """Delete the files of steps past `after`."""
    for step in _steps(folder):
        if step > after:
            _path(folder, step).unlink(missing_ok=True)


def read_snapshots(run: Path) -> list[Snapshot]:
    """The files of a run, oldest first, that belong to the same averages as the newest one.

    Raises:
        ValueError: when there are none, or one is damaged.
    """
    folder = run / FOLDER
    paths = [_path(folder, step) for step in _steps(folder)]
    if not paths:
        raise ValueError(f"{folder} holds no averages; accepted: a run with train.ema_lengths, e.g. (0.05, 0.10)")
    headers = [read_header(path) for path in paths]
    series = [(header["origin"], header["lengths"]) for header in headers]
    return [
        Snapshot(path, header["step"], header["updates"], tuple(header["lengths"]))
        for path, header, own in zip(paths, headers, series)
        if own == series[-1]
    ]


class Reconstruction:
    """Averages of any length at the time of the newest of some snapshots.

    Args:
        snapshots: of one run, oldest first.
    """

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self.snapshots = snapshots

    def _combined(self, length: float) -> tuple[list[float], float]:
        stored = [(s.updates, exponent(sigma)) for s in self.snapshots for sigma in s.lengths]
        coefficients, misfit = combination(*zip(*stored), self.snapshots[-1].updates, exponent(length))
        return coefficients.tolist(), misfit

    def misfit(self, length: float) -> float:
        """How far the profile of what can be made is from that of the length wanted, as a part of its norm."""
        return self._combined(length)[1]

    def tensors(self, length: float) -> dict[str, torch.Tensor]:
        """The average of a length, float32 by parameter name; a few tensors at a time are in memory beside it."""
        coefficients, _ = self._combined(length)
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(s.path, framework="pt")) for s in self.snapshots]
            own = [(file, i) for file, s in zip(files, self.snapshots) for i in range(len(s.lengths))]
            parts = [(file, i, weight) for (file, i), weight in zip(own, coefficients)]
            names = [key.removeprefix("0.") for key in files[-1].keys() if key.startswith("0.")]
            return {
                name: sum(weight * file.get_tensor(f"{i}.{name}").double() for file, i, weight in parts).float()
                for name in names
            }
