"""One training step on the devices of several processes."""

from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from runtime.processes import Processes

# Processes agree before each step, so they enter it together; apart from that they differ in how long they compile.
_TIMEOUT = timedelta(hours=1)


class _Loss(nn.Module):
    """The loss of a stage as a module, so that `DistributedDataParallel` can follow its gradients."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(stage.modules)
        self._stage = stage

    def forward(self, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self._stage.loss(batch, generator)


def data_parallel(stage: Any, processes: Processes, device: torch.device) -> DistributedDataParallel | None:
    """The loss of a `Stage` whose backward pass leaves in every process the mean of the gradients of all of them.

    The stage keeps its networks, which from now on have the weights of rank 0. Returns None for a process
    alone, whose gradients are complete.
    """
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
