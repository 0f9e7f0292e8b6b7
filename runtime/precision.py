"""Device and precision: chosen once, here."""

import contextlib
from dataclasses import dataclass

import torch

from runtime.allocator import keep_freed_memory
from runtime.processes import Processes


def pick_device(name: str) -> torch.device:
    """Return the device for `run.device` = "auto" | "cpu" | "cuda"; under torchrun each process has a GPU of its own.

    From here on float32 means float32: no product of this process is rounded to TF32, which keeps three digits.
    PyTorch's default is to do so in convolutions on a GPU. What may be coarser is said by autocast, see `Precision`.

    Raises:
        ValueError: when CUDA is asked for and not available, or has fewer devices than torchrun started processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device='cuda': no CUDA device is visible to PyTorch; accepted: auto, cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    processes, count = Processes.from_environment(), torch.cuda.device_count()
    if processes.world_size == 1:
        return torch.device("cuda")
    if processes.local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK: beyond the {count} CUDA devices visible to PyTorch; accepted: torchrun "
            f"--nproc_per_node={count} or less, or run.device=cpu"
        )
    device = torch.device("cuda", processes.local_rank)
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
