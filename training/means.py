"""Means of what training logs."""

from typing import Any

import torch

from runtime.processes import Processes


class Means:
    """Means of scalars over steps and processes; sums and counts stay on the device until they are read."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._names: list[str] = []
        self._sums: torch.Tensor | None = None  # float64 (2, scalars): sums, and how many each is of

    def add(self, scalars: dict[str, torch.Tensor], taken: torch.Tensor) -> None:
        """Add the scalars of one step of this process; those that are not finite, and all unless `taken`, are left out.

        taken: bool (), on the device.
        """
        values = torch.stack([value.float() for value in scalars.values()]).double()
        counted = values.isfinite() & taken
        added = torch.stack([torch.where(counted, values, 0.0), counted.double()])
        self._names, self._sums = list(scalars), added if self._sums is None else self._sums + added

    def share(self) -> None:
        """Let all processes go on from the same sums, their mean; with several, this waits for the device."""
        if self.processes.world_size > 1:
            everyones = self.processes.gather(None if self._sums is None else self._sums.cpu())
            if self._sums is not None:
                self._sums.copy_(torch.stack(everyones).mean(dim=0))

    def read(self) -> dict[str, float]:
        """The means, NaN where no step counts; waits for the device."""
        if self._sums is None:
            return {}
        sums, counts = self._sums
        return dict(zip(self._names, (sums / counts).tolist()))

    def clear(self) -> None:
        self._sums = None

    def state_dict(self) -> dict[str, Any]:
        return {"names": self._names, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._names, self._sums = state["names"], state["sums"]
