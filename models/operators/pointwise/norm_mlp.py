"""Normalisation, modulation and MLP of the residual blocks: fused in Triton on a GPU, else in PyTorch.

Letters: B batch, M points, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from models.operators import dispatch

Affine = tuple[torch.Tensor, torch.Tensor]  # a and b of a norm and its modulation, (B, C) each, in float32 at least

# Numbers computed at once without gradients: on a CPU as many as its caches hold, elsewhere what bounds the memory.
_PART = {"cpu": 1 << 17, "cuda": 1 << 24}


def product_type(x: torch.Tensor) -> torch.dtype:
    """The type in which x enters matrix products: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def modulate(h: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """h·a + b for h (B, …, C) and vectors (B, C), in the type of h, to which they are not rounded."""
    inner = (1,) * (h.ndim - 2)
    a, b = (vector.unflatten(1, (*inner, -1)) for vector in (a, b))  # (B, 1…, C)
    return torch.addcmul(b, h, a).to(h.dtype)


def norm_modulate(
    x: torch.Tensor, norm: nn.LayerNorm, affine: Affine | None = None, plain: bool = False
) -> torch.Tensor:
    """xhat·a + b, xhat = (x − mean) / √(variance + eps), in the type of products, that of autocast.

    x: (B, …, C). affine: a and b (B, C), of `models.modulation`; None for those of the norm. plain: compute in PyTorch
    wherever it is. Returns the shape of x.
    """
    # Under torch.compile, the compiler fuses the formula, and with it what comes before and after.
    fused = None if torch.compiler.is_compiling() else dispatch.kernels("norm and MLP", x.device.type, plain)
    if fused is not None and fused.supports(x):
        return fused.norm_modulate(x, *(affine or (norm.weight, norm.bias)), norm.eps, product_type(x))
    return _in_parts(partial(_norm_modulate, norm, affine), x)


def _norm_modulate(norm: nn.LayerNorm, affine: Affine | None, x: torch.Tensor) -> torch.Tensor:
    if affine is None:
        h = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    else:
        h = modulate(F.layer_norm(x, norm.normalized_shape, eps=norm.eps), *affine)
    return h.to(product_type(x))


def norm_modulate_mlp(
    x: torch.Tensor, norm: nn.LayerNorm, affine: Affine | None, mlp: nn.Sequential, plain: bool = False
) -> torch.Tensor:
    """x + mlp(xhat·a + b), mlp of a linear layer to 2C channels, GELU, and a linear layer back.

    x: (B, M, C); where no gradient is wanted, the result may take its place. affine, plain: as above. Returns
    (B, M, C).
    """
    fused, dtype = dispatch.kernels("norm and MLP", x.device.type, plain), product_type(x)
    if fused is not None and fused.supports_mlp(x, dtype):
        weights = (mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias)
        return fused.norm_modulate_mlp(x, *(affine or (norm.weight, norm.bias)), *weights, norm.eps, dtype)
    return _in_parts(lambda part: part + mlp(norm_modulate(part, norm, affine, plain)), x, out=x)


def join(x: torch.Tensor, skip: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """layer([x, skip]), spared being laid side by side first.

    x, skip: (B, M, C); where no gradient is wanted, the result may take the place of x. layer: of 2C channels to C.
    Returns (B, M, C).
    """
    of_x, of_skip = layer.weight.chunk(2, dim=1)
    return _in_parts(lambda x, skip: F.linear(x, of_x, layer.bias) + F.linear(skip, of_skip), x, skip, out=x)


def _in_parts(
    compute: Callable[..., torch.Tensor], *features: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """compute(*features) for a pointwise function; where no gradient is wanted, a part of the points at a time.

    features: (B, M, C), or other shapes, which are computed at once. out: takes the result where it is made in parts.
    """
    x = features[0]
    points = max(_PART.get(x.device.type, _PART["cuda"]) // x.shape[-1], 1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.ndim != 3 or x.shape[1] <= points:
        return compute(*features)
    for i, part in enumerate(zip(*(t.split(points, dim=1) for t in features))):
        made = compute(*part)
        out = made.new_empty(x.shape) if out is None else out
        out[:, i * points : (i + 1) * points] = made
    assert out is not None
    return out
