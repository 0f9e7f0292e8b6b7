"""Means of what training logs."""

import torch

from configs.processes import Processes


class Means:
    """Means of scalars over steps and processes; the sums stay on the device until they are read."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.sums: dict[str, torch.Tensor] = {}
        self.count = 0

    def add(self, scalars: dict[str, torch.Tensor]) -> None:
        """Add the scalars of one step of this process."""
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()
        self.count += 1

    def share(self) -> None:
        """Let all processes go on from the same sums, their mean; with several, this waits for the device."""
        if self.processes.world_size > 1:
            everyones = self.processes.gather({name: value.item() for name, value in self.sums.items()})
            for name, value in self.sums.items():
                self.sums[name] = torch.full_like(value, sum(sums[name] for sums in everyones) / len(everyones))

    def read(self) -> dict[str, float]:
        """The means; waits for the device."""
        return {name: (total / self.count).item() for name, total in self.sums.items()}

    def clear(self) -> None:
        self.sums, self.count = {}, 0
