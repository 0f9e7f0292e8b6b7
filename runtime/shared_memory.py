"""One copy of decoded images for all processes of a machine.

The first process of a machine decodes them into memory without a name, which the others open through /proc. The kernel
frees it with the last process that uses it, however that ends, so there is nothing to remove.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
from functools import partial

import torch

from data.base import Fill, Keep, own_memory
from runtime.processes import Processes

_log = logging.getLogger(__name__)


def one_per_machine(processes: Processes) -> Keep:
    """Where processes that train together keep decoded images: all of them ask for each set, in the same order.

    A process alone keeps its own copy. So do all on a system without memory of this kind, which Linux has.
    """
    if processes.world_size == 1 or not hasattr(os, "memfd_create"):
        return own_memory
    return partial(_shared, processes)


def _shared(processes: Processes, shape: tuple[int, ...], fill: Fill) -> torch.Tensor:
    """The tensor that the first process of the machine fills; what stops it stops the others by the same line.

    Raises:
        ValueError: also where another process has found images of another shape.
    """
    file, pixels, error = -1, torch.empty(0), None
    if processes.local_rank == 0:
        try:
            file = os.memfd_create("images")
            os.ftruncate(file, math.prod(shape))
            pixels = _mapped(file, shape)
            fill(pixels)
        except (ValueError, OSError) as found:
            error = found
    made = processes.gather((shape, os.getpid(), file, str(error or "")))
    # torchrun counts the processes of a machine in a row.
    its_shape, owner, its_file, fault = made[processes.rank - processes.local_rank]
    try:
        if error is not None:
            raise error
        if fault or its_shape != shape:
            raise ValueError(fault or f"process {processes.rank} finds images of {shape}, another of {its_shape}")
        if processes.local_rank == 0:
            return pixels
        try:
            return _opened(f"/proc/{owner}/fd/{its_file}", shape)
        except OSError as closed:
            _log.warning("process %d keeps its own copy of the images (%s)", processes.rank, closed)
            return own_memory(shape, fill)
    finally:
        processes.agree()  # all have opened the file, and have come so far whatever befell them
        if file >= 0:
            os.close(file)


def _opened(path: str, shape: tuple[int, ...]) -> torch.Tensor:
    file = os.open(path, os.O_RDWR)
    try:
        return _mapped(file, shape)
    finally:
        os.close(file)


def _mapped(file: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, math.prod(shape)), dtype=torch.uint8).view(shape)
