"""Device and mixed-precision choices, made once."""

import contextlib
from dataclasses import dataclass

import torch


def pick_device(name: str) -> torch.device:
    """Return the device for `run.device` = "auto" | "cpu" | "cuda".

    Raises:
        ValueError: when CUDA is asked for and not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device='cuda': no CUDA device is visible to PyTorch; accepted: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Precision:
    """The autocast data type of a device, or None for full precision.

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
