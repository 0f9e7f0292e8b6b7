"""Normalisation, modulation and MLP of the residual blocks: fused in Triton or C where these can be, else in PyTorch.

Letters: B batch, M points, C channels.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import modulate
from models.operators.native import cpu_pointwise, memory
from models.triton_support import kernels_for


def norm_modulate(
    x: torch.Tensor,
    norm: nn.LayerNorm,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    spare: torch.Tensor | None = None,
) -> torch.Tensor:
    """norm(x)·scale + shift; where fused, in the type of autocast.

    x: (B, …, C). scale, shift: (B, C), of `Modulation`. spare: of `spare_memory`, taken by the result where no gradient
    is wanted. Returns the shape of x.
    """
    # Under torch.compile, the compiler fuses the formula, and with it what comes before and after.
    fused = None if torch.compiler.is_compiling() else _engine(x)
    if fused is not None and fused.supports(points := x.flatten(1, -2)):  # (B, M, C)
        if spare is not None and _reuses(x) and _reuses(spare):
            fused.norm_modulate_into(spare, points, norm.weight, norm.bias, scale, shift, eps=norm.eps)
            return spare
        h = fused.norm_modulate(points, norm.weight, norm.bias, scale, shift, norm.eps, _product_type(x))
        return h.view(x.shape)
    h = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return modulate(h, scale, shift)


def norm_modulate_mlp(
    x: torch.Tensor,
    norm: nn.LayerNorm,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mlp: nn.Sequential,
    chunk_points: int = 0,
    overwrite: bool = False,
) -> torch.Tensor:
    """x + mlp(norm(x)·scale + shift), mlp of a linear layer to 2C channels, GELU, and a linear layer back.

    x: (B, M, C). scale, shift: (B, C), of `Modulation`. chunk_points: points of each image to compute at once where no
    gradient is wanted and nothing is fused, which bounds what is held between the layers; 0 for all. overwrite: x is
    not needed afterwards; where no gradient is wanted the result may then take its place. Returns (B, M, C).
    """
    fused, dtype = _engine(x), _product_type(x)
    if fused is None or not fused.supports_mlp(x, dtype):
        if chunk_points and not torch.is_grad_enabled():
            out = torch.empty_like(x)
            for part, place in zip(x.split(chunk_points, dim=1), out.split(chunk_points, dim=1)):
                place.copy_(part + mlp(norm_modulate(part, norm, scale, shift)))
            return out
        return x + mlp(norm_modulate(x, norm, scale, shift))
    weights = (mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias)
    if overwrite and _reuses(x):
        fused.norm_modulate_mlp_(x, norm.weight, norm.bias, scale, shift, *weights, eps=norm.eps)
        return x
    return fused.norm_modulate_mlp(x, norm.weight, norm.bias, scale, shift, *weights, norm.eps, dtype)


def join(x: torch.Tensor, skip: torch.Tensor, layer: nn.Linear, overwrite: bool = False) -> torch.Tensor:
    """layer([x, skip]), spared being laid side by side first.

    x, skip: (B, M, C). layer: of 2C channels to C. overwrite: as for `norm_modulate_mlp`. Returns (B, M, C).
    """
    if overwrite and _reuses(x) and cpu_pointwise.supports_mlp(x, _product_type(x)):
        cpu_pointwise.join_(x, skip, layer.weight, layer.bias)
        return x
    of_x, of_skip = layer.weight.chunk(2, dim=1)
    return F.linear(x, of_x, layer.bias) + F.linear(skip, of_skip)


def spare_memory(h: torch.Tensor) -> torch.Tensor | None:
    """Memory like h (B, M, C) for the results of `norm_modulate`, where it takes it.

    Fresh memory for a large lattice costs a CPU as much time as the arithmetic.
    """
    return memory.empty(*h.shape) if _reuses(h) and cpu_pointwise.supports(h) else None


def _reuses(x: torch.Tensor) -> bool:
    """Whether a result may be written where x is; only on a CPU does that save anything."""
    eager = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and x.device.type == "cpu" and x.is_contiguous()


def _engine(x: torch.Tensor) -> ModuleType | None:
    on_gpu = kernels_for(x.device.type, "models.operators.native.triton_pointwise")
    return cpu_pointwise if x.device.type == "cpu" else on_gpu


def _product_type(x: torch.Tensor) -> torch.dtype:
    """The type in which x enters matrix products: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
