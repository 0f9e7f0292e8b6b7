"""Reading parity vectors: archives that remember what was compared, and the comparison itself."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import numpy as np
import torch

OUTPUTS, GRADIENTS, END_TO_END = 2e-5, 1e-4, 5e-5  # largest difference, relative to the largest absolute value
# At t = 999 the last digit of a frequency moves the angle by 6e-5, and float32 exponentials of processors differ in it.
TIME_FEATURES = 6.5e-5


class Vectors:
    """One archive. Reading an array marks it as compared; `unread` lists what no check has asked for."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as archive:
            self._arrays = {name: archive[name] for name in archive.files}
        self.files = list(self._arrays)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self._read.add(name)
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    @property
    def config(self) -> dict:
        return json.loads(str(self["config"]))

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self[name].copy())

    def optional(self, name: str) -> torch.Tensor | None:
        return self.tensor(name) if name in self else None

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names that begin with it."""
        return [name[len(prefix) :] for name in self.files if name.startswith(prefix)]

    def heads(self, prefix: str) -> list[str]:
        """The first parts, up to a slash, of what follows `prefix`, in order."""
        return list(dict.fromkeys(name.split("/")[0] for name in self.names(prefix)))

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {name: self.tensor(prefix + name) for name in self.names(prefix)}

    def unread(self, left_out: list[str]) -> list[str]:
        """Results nobody has read, but for those that match one of the patterns; inputs and parameters do not count."""
        results = (name for name in self.files if not name.startswith(("in/", "param/")))
        return [
            name
            for name in results
            if name not in self._read and not any(fnmatch.fnmatch(name, pattern) for pattern in left_out)
        ]


def assert_close(label: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """max|a − b| ≤ tolerance · max|b|, shapes equal."""
    assert tuple(ours.shape) == tuple(theirs.shape), f"{label}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    difference = (ours.detach().double() - theirs.double()).abs().max().item()
    scale = theirs.double().abs().max().item()
    assert difference <= tolerance * scale, f"{label}: differs by {difference / max(scale, 1e-300):.2e}"
