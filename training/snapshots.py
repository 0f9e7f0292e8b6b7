"""Power-function averages of a run on disk, from which averages of other lengths are made after training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.stored import differences, require_config, shaping
from runtime.weights import open_weights, require_shapes, save_weights
from training.ema import PowerAverages
from training.power_averages import combination, exponent

FOLDER = "averages"  # of a run
_NAME = re.compile(r"step_(\d{8})\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """A file of averages: the step it was taken at, how many updates the averages have seen, and their lengths.

    origin: the step at which these averages began. tensors: "i.network.parameter" of length i, read when asked for.
    """

    path: Path
    step: int
    updates: int
    origin: int
    lengths: tuple[float, ...]
    tensors: Mapping[str, torch.Tensor]


def _steps(folder: Path) -> list[int]:
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step_*.safetensors"))
    return sorted(int(name[1]) for name in names if name)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"


def save_snapshot(folder: Path, step: int, averages: PowerAverages, config: dict[str, Any]) -> None:
    """Write the averages of `step` atomically, if they have seen anything; config: the plain one of the run.

    While there are more than `train.ema_snapshots` files, only those at multiples of 2, 4, … times
    `train.ema_snapshot_steps` stay, and the newest one.

    Raises:
        FloatingPointError: when a tensor is not finite; then nothing is written.
    """
    if not averages.updates:
        return
    train = config["train"]
    dtype, every = getattr(torch, train["ema_snapshot_dtype"]), train["ema_snapshot_steps"]
    tensors = {
        f"{i}.{name}": value.to(dtype) for i, values in enumerate(averages.values) for name, value in values.items()
    }
    known = {
        "step": step,
        "config": shaping(config),
        "updates": averages.updates,
        "origin": averages.origin,
        "lengths": averages.lengths,
    }
    save_weights(_path(folder, step), tensors, known)
    while len(steps := _steps(folder)) > train["ema_snapshots"] and every <= step:
        every *= 2
        for old in steps[:-1]:
            if old % every:
                _path(folder, old).unlink(missing_ok=True)


def drop_snapshots(folder: Path, after: int) -> None:
    """Delete the files of steps past `after`."""
    for step in _steps(folder):
        if step > after:
            _path(folder, step).unlink(missing_ok=True)


def read_snapshots(run: Path, networks: Mapping[str, nn.Module], config: dict[str, Any]) -> list[Snapshot]:
    """The files of a run, oldest first, that belong to the same averages as the newest one.

    Args:
        run: its folder.
        networks: its networks by name, on any device.
        config: its plain configuration.
    Raises:
        ValueError: when there are none, or one is damaged, or not of this run.
    """
    folder = run / FOLDER
    own = {f"{name}.{key}": p for name, network in networks.items() for key, p in network.named_parameters()}
    found = [_read(_path(folder, step), step, own, config) for step in _steps(folder)]
    if not found:
        raise ValueError(f"{folder} holds no averages; accepted: a run with train.ema_lengths, e.g. (0.05, 0.10)")
    return [s for s in found if (s.origin, s.lengths) == (found[-1].origin, found[-1].lengths)]


def _read(path: Path, step: int, own: Mapping[str, torch.Tensor], config: dict[str, Any]) -> Snapshot:
    """The averages of a step of the run with these parameters and this configuration; ValueError naming the file."""
    tensors, header = open_weights(path)
    counts, lengths = [header.get(name) for name in ("step", "updates", "origin")], header.get("lengths")
    numbers = isinstance(lengths, list) and all(isinstance(length, float) for length in lengths)
    if not (numbers and lengths and all(isinstance(count, int) for count in counts)):
        raise ValueError(f"{path}: holds no averages; accepted: what training with train.ema_lengths wrote there")
    if counts[0] != step:
        raise ValueError(f"{path}: holds averages of step {counts[0]}; accepted: those of the step in its name")
    if other := differences(require_config(header.get("config", {}), str(path)), config):
        raise ValueError(f"{path}: is of another run ({'; '.join(other)}); accepted: averages of this run")
    require_shapes({f"{i}.{name}": p for i in range(len(lengths)) for name, p in own.items()}, tensors, str(path))
    return Snapshot(path, *counts, tuple(lengths), tensors)


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
        own = [(s.tensors, i) for s in self.snapshots for i in range(len(s.lengths))]
        parts = [(tensors, i, weight) for (tensors, i), weight in zip(own, coefficients)]
        names = [key.removeprefix("0.") for key in self.snapshots[-1].tensors if key.startswith("0.")]
        return {
            name: sum(weight * tensors[f"{i}.{name}"].double() for tensors, i, weight in parts).float()
            for name in names
        }
