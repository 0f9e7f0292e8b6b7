"""Options of training that trade compile time or arithmetic for speed or memory, without changing what is computed."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.schema import ImageTrainConfig, TrainConfig
from models.grid_unet import GridBlock
from models.operators.triton_support import available
from models.sparse_block import SparseBlock


def accelerate(modules: dict[str, nn.Module], train: TrainConfig, device: torch.device) -> None:
    """Apply `train.compile`, and in stage one `train.recompute`, to networks about to be trained, in place.

    Only `forward` is replaced: names of parameters and copies made before stay as they are.
    """
    for module in modules.values():
        if isinstance(train, ImageTrainConfig) and train.recompute:
            for block in module.modules():
                if isinstance(block, GridBlock | SparseBlock):
                    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        mode = compile_mode(train.compile, device)
        if mode is not None:
            # The dense part of a network has one shape in all steps; around it are few operators, most of them fused.
            dense = getattr(module, "grid", module)
            dense.forward = torch.compile(dense.forward, mode=mode, dynamic=False)


def compile_mode(choice: str, device: torch.device) -> str | None:
    """The mode for `torch.compile`, or None for no compilation; "auto" compiles on a GPU alone, where that can be.

    On a CPU compiling the embedded default takes longer than it can win back in its two minutes.
    """
    if choice == "auto":
        return "default" if device.type == "cuda" and available() else None
    return None if choice == "off" else choice
