"""Device and precision: chosen once, here."""

import contextlib
from dataclasses import dataclass

import torch

from runtime.allocator import keep_freed_memory
from runtime.processes import Processes

_DEVICES = "accepted: auto, cpu, cuda, or cuda:N"


def pick_device(given: str | int | torch.device) -> torch.device:
    """Return the device for "auto", or for what `torch.device` takes: "cpu", "cuda", "cuda:1", 1.

    Under torchrun each process has a GPU of its own, unless a number says which.

    From here on float32 means float32: no product of this process is rounded to TF32, which keeps three digits.
    PyTorch's default is to do so in convolutions on a GPU. What may be coarser is said by autocast, see `Precision`.

    Raises:
        ValueError: for another kind of device; when CUDA is asked for and not available, or has fewer devices than
            the number says, or than torchrun started processes.
    """
    available = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if available else "cpu") if given == "auto" else given)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {given!r}, which PyTorch does not know; {_DEVICES}") from None
    if device.type not in ("cpu", "cuda"):
        reason = "has no float64, in which noise schedules are kept" if device.type == "mps" else "is not supported"
        raise ValueError(f"device is {given!r}, which {reason}; {_DEVICES}")
    if device.type == "cuda" and (device.index or 0) >= (torch.cuda.device_count() if available else 0):
        raise ValueError(f"device is {given!r}, not among the CUDA devices visible to PyTorch; {_DEVICES}")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cpu":
        keep_freed_memory()
        return device
    processes, count = Processes.from_environment(), torch.cuda.device_count()
    if device.index is None and processes.world_size == 1:
        return device
    if device.index is None and processes.local_rank >= count:
        raise ValueError(
            f"device is that of LOCAL_RANK {processes.local_rank}, beyond the {count} CUDA devices visible to PyTorch; "
            f"accepted: torchrun --nproc_per_node={count} or less, or cpu"
        )
    device = device if device.index is not None else torch.device("cuda", processes.local_rank)
    torch.cuda.set_device(device)  # for kernels and streams that go to the current device
    return device


@dataclass(frozen=True)
class Precision:
    """The autocast data type of a device, or None for full precision: float32 throughout, see `pick_device`.

    bfloat16 needs no loss scaling; float16 does, since its gradients underflow.
    """

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def create(cls, device: torch.device, amp: bool, amp_dtype: str = "auto") -> "Precision":
        """Choose for `train.amp` and `train.amp_dtype`; a CPU always computes in full precision."""
        if not amp or device.type != "cuda":
            return cls(device, None)
        if amp_dtype == "auto":
            amp_dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        return cls(device, getattr(torch, amp_dtype))

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which networks are evaluated."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A loss scaler, active for float16 alone."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def describe(device: torch.device, dtype: torch.dtype | None) -> str:
    """A device and the type it computes in, for people, e.g. "NVIDIA H100 (cuda), bfloat16"."""
    name = f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)
    return f"{name}, {str(dtype or torch.float32).removeprefix('torch.')}"
