"""The loss and the gradient of a batch that is divided: among processes, and by each of them into parts.

Everything random is drawn for the whole batch, of which each part takes its rows. So the numbers of processes and of
parts change nothing but the rounding.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import TrainConfig
from diffusion.random import Purpose, seed_global, stream
from diffusion.transfer import to_device
from models.layers import Dropout
from runtime.precision import Precision
from runtime.processes import Processes
from training.stage import Draws, Stage

# Processes agree before each step, so they enter it together; apart from that they differ in how long they compile.
_TIMEOUT = timedelta(hours=1)


def part_size(train: TrainConfig, processes: Processes) -> int:
    """How many examples are computed at once: train.batch_size over processes and train.accumulate parts of each.

    Raises:
        ValueError: where these do not divide the batch.
    """
    parts = processes.world_size * train.accumulate
    if train.batch_size % parts:
        factors = [f"the {processes.world_size} processes"] if processes.world_size > 1 else []
        factors += [f"train.accumulate={train.accumulate}"] if train.accumulate > 1 else []
        raise ValueError(f"train.batch_size is {train.batch_size}; accepted: multiples of {' times '.join(factors)}")
    return train.batch_size // parts


class DividedBatch:
    """Adds up the gradient of a `Stage` over the parts of a batch; every process ends with the mean of all.

    The stage keeps its networks, which from now on have the weights of rank 0. ValueError as of `part_size`.
    """

    def __init__(self, stage: Stage, train: TrainConfig, precision: Precision, processes: Processes) -> None:
        size, share = part_size(train, processes), train.batch_size // processes.world_size
        self.stage, self.precision, self.processes = stage, precision, processes
        self.batch_size, self.device = train.batch_size, precision.device
        self.share = slice(processes.rank * share, (processes.rank + 1) * share)
        self.parts = [slice(first, first + size) for first in range(0, share, size)]  # of the share
        self.parallel = _parallel(stage, processes, self.device)
        self._dropouts, self._rows = [], torch.arange(self.share.start, self.share.stop).to(self.device)
        if size < train.batch_size:
            modules = (part for network in stage.modules.values() for part in network.modules())
            self._dropouts = [module for module in modules if isinstance(module, Dropout)]

    def backward(
        self, batch: torch.Tensor, seed: int, step: int, scaler: torch.amp.GradScaler
    ) -> dict[str, torch.Tensor]:
        """Add the scaled gradient of the mean loss, and return the loss of this process and what else is logged.

        Args:
            batch: this process's share (uint8 images, or numbers of latents), in the order of the whole batch.
            seed, step: which random numbers are drawn.
            scaler: of the loss.
        """
        batch = to_device(batch, self.device)
        generator = stream(seed, Purpose.STEP, step, 0, device=self.device)
        draws = self.stage.draw(generator, self.batch_size, self.share, batch)
        if self.processes.world_size > 1:  # what was drawn for others need not stay
            draws = {name: numbers.clone() for name, numbers in draws.items()}
        sums: dict[str, torch.Tensor] = {}
        each = []
        for part in self.parts:
            for dropout in self._dropouts:
                dropout.batch, dropout.rows = self.batch_size, self._rows[part]
            seed_global(seed, Purpose.DROPOUT, step, 0, device=self.device)
            own = {name: numbers[part] for name, numbers in draws.items()}
            with self._exchanged_after_the_last(part):
                with self.precision.autocast():
                    loss, losses, scalars = (self.parallel or self.stage.loss)(batch[part], own)
                scaler.scale(loss / len(self.parts)).backward()
            each.append(losses)
            for name, value in {"loss": loss.detach(), **scalars}.items():
                sums[name] = sums[name] + value if name in sums else value
        self.stage.learn(draws, torch.cat(each))
        return {name: value / len(self.parts) for name, value in sums.items()}

    def _exchanged_after_the_last(self, part: slice) -> contextlib.AbstractContextManager:
        """Where processes exchange gradients only after the last part, which ends with the mean of all sums."""
        if self.parallel is None or part is self.parts[-1]:
            return contextlib.nullcontext()
        return self.parallel.no_sync()


class _Loss(nn.Module):
    """The loss of a stage as a module, so that `DistributedDataParallel` can follow its gradients."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(stage.modules)
        self._stage = stage

    def forward(self, batch: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return self._stage.loss(batch, draws)


def _parallel(stage: Stage, processes: Processes, device: torch.device) -> DistributedDataParallel | None:
    """The loss whose backward pass leaves in every process the mean of the gradients of all; None for one alone."""
    if processes.world_size == 1:
        return None
    processes.agree()  # faults so far are told here; what follows cannot be left alone
    return DistributedDataParallel(_Loss(stage), process_group=_group(device.type), gradient_as_bucket_view=True)


@lru_cache
def _group(device_type: str) -> dist.ProcessGroup:
    """The processes as they exchange tensors of such a device; all of them ask for it together."""
    return dist.new_group(backend="nccl" if device_type == "cuda" else "gloo", timeout=_TIMEOUT)


def stacked(own: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The tensors of all processes by rank, (processes, ...); within a step, and on GPUs without waiting for them."""
    if processes.world_size == 1:
        return own.unsqueeze(0)
    everyones = [torch.empty_like(own) for _ in range(processes.world_size)]
    dist.all_gather(everyones, own, group=_group(own.device.type))
    return torch.stack(everyones)
