"""Normalisation, modulation and MLP of the residual blocks on GPUs, each in one pass over the features.

    h = xhat · a + b,    xhat = (x − mean) / √(variance + eps)                     `norm_modulate`
    out = x + W₂·gelu(W₁·h + b₁) + b₂                                              `norm_modulate_mlp`

a and b are vectors per image, of the LayerNorm and the modulation together (`models.modulation`). In the second, they
go on into weights per image: W₁·h + b₁ = (W₁·diag(a))·xhat + (b₁ + W₁·b). The kernels know only these; the chain rule
takes the gradients from there to all parameters in PyTorch, on tensors as small as the parameters.

Statistics, sums and accumulators are float32. Backward passes are given x alone and compute the rest again. Sums over
rows go through partial sums whose number depends on the shape alone, so gradients are the same to the last bit in
every run.

Letters: B images, M rows of an image, C channels, 2C hidden channels, G groups of rows that share a partial sum.
"""

from __future__ import annotations

import math

import torch
import triton

from models.operators.opaque import opaque
from models.operators.pointwise import triton_kernels as kernels

# Programs of a launch. Each of an MLP loads the weights first and, backward, leaves partial sums as large as they are.
_NORM_PROGRAMS, _FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 2048, 1024, 256


def _groups(batch: int, count: int, rows: int, programs: int) -> int:
    return max(min(triton.cdiv(count, rows), programs // batch), 1)


def supports(x: torch.Tensor) -> bool:
    """Whether `norm_modulate` takes these features: on a GPU, of at most 4096 channels, not empty, nor float64."""
    runs = x.is_cuda or not isinstance(kernels.norm_forward, triton.JITFunction)  # or under Triton's interpreter
    return (
        runs
        and x.ndim >= 3
        and (x.dtype, x.dtype) in kernels.KINDS
        and x.numel() > 0
        and x.shape[-1] <= kernels.MAX_CHANNELS
    )


def supports_mlp(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `norm_modulate_mlp` takes these features with matrix products of factors of type `dtype`."""
    kind = kernels.KINDS.get((x.dtype, dtype))
    tile = None if kind is None else kernels.TILES.get((x.shape[-1], kind))
    return (
        x.ndim == 3 and tile is not None and supports(x) and (not x.is_cuda or tile.shared <= _shared_memory(x.device))
    )


def _shared_memory(device: torch.device) -> int:
    """Bytes a program may take; AMD's devices do not say, and have no more than these."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10)


def _stride(vectors: torch.Tensor) -> int:
    """From the vector of an image to that of the next."""
    return 0 if vectors.ndim == 1 else vectors.shape[1]


@opaque("infty_diff::norm_affine")
def _norm_affine(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """xhat·a + b for x (B, …, C) and float32 a, b (B, C), or (C,) for all images."""
    x, out, options = x.contiguous(), x.new_empty(x.shape, dtype=dtype), kernels.norm_options(x.shape[-1])
    count = math.prod(x.shape[1:-1])
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(count, options["ROWS"]), x.shape[0])
        kernels.norm_forward[grid](x, a.contiguous(), b.contiguous(), out, count, _stride(a), eps, **options)
    return out


@_norm_affine.register_fake
def _(x, a, b, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@opaque("infty_diff::norm_affine_backward")
def _norm_affine_backward(
    x: torch.Tensor, a: torch.Tensor, dout: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, a and b."""
    (batch, *inner, channels), options = x.shape, kernels.norm_options(x.shape[-1])
    count = math.prod(inner)
    groups = _groups(batch, count, options["ROWS"], _NORM_PROGRAMS)
    dx = x.new_empty(x.shape)
    da, db = a.new_empty(2, batch, groups, channels)
    with torch.cuda.device_of(x):
        arguments = (x.contiguous(), a.contiguous(), dout.contiguous(), dx, da, db, count, _stride(a), eps)
        kernels.norm_backward[groups, batch](*arguments, **options)
    shared = (0, 1) if a.ndim == 1 else 1
    return dx, da.sum(shared), db.sum(shared)


@_norm_affine_backward.register_fake
def _(x, a, dout, eps):
    return x.new_empty(x.shape), a.new_empty(a.shape), a.new_empty(a.shape)


def _save_norm(ctx, inputs, output):
    x, a, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, a)


def _norm_gradients(ctx, dout):
    return (*_norm_affine_backward(*ctx.saved_tensors, dout, ctx.eps), None, None)


_norm_affine.register_autograd(_norm_gradients, _save_norm)


@opaque("infty_diff::norm_mlp")
def _norm_mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x + w2·gelu(w1·xhat + b1) + b2 for x (B, M, C) and float32 w1 (B, 2C, C), b1 (B, 2C), w2 (C, 2C), b2 (C)."""
    x, out = x.contiguous(), x.new_empty(x.shape)
    options, _ = kernels.mlp_options(x.shape[2], x.dtype, dtype)
    with torch.cuda.device_of(x):
        grid = (_groups(x.shape[0], x.shape[1], options["ROWS"], _FORWARD_PROGRAMS), x.shape[0])
        weights = [weight.contiguous() for weight in (w1, b1, w2, b2)]
        kernels.mlp_forward[grid](x, *weights, out, x.shape[1], eps, **options)
    return out


@_norm_mlp.register_fake
def _(x, w1, b1, w2, b2, eps, dtype):
    return x.new_empty(x.shape)


@opaque("infty_diff::norm_mlp_backward")
def _norm_mlp_backward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    dout: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, w1, b1, w2 and b2."""
    batch, count, channels = x.shape
    _, launches = kernels.mlp_options(channels, x.dtype, dtype)
    groups = _groups(batch, count, launches[0]["ROWS"], _BACKWARD_PROGRAMS)
    dx = x.new_empty(x.shape)
    partials = [
        w1.new_empty(batch, groups, *shape)
        for shape in ((2 * channels, channels), (2 * channels,), w2.shape, (channels,))
    ]
    with torch.cuda.device_of(x):
        arguments = [tensor.contiguous() for tensor in (x, w1, b1, w2, dout)] + [dx, *partials, count, eps]
        for options in launches:
            kernels.mlp_backward[groups, batch, 2 * channels // options["CHUNK"]](*arguments, **options)
    dw1, db1, dw2, db2 = partials
    return dx, dw1.sum(1), db1.sum(1), dw2.sum((0, 1)), db2.sum((0, 1))


@_norm_mlp_backward.register_fake
def _(x, w1, b1, w2, dout, eps, dtype):
    return (*(tensor.new_empty(tensor.shape) for tensor in (x, w1, b1, w2)), w2.new_empty(w2.shape[:1]))


def _save_mlp(ctx, inputs, output):
    *tensors, _, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _mlp_gradients(ctx, dout):
    return (*_norm_mlp_backward(*ctx.saved_tensors, dout, ctx.eps, ctx.dtype), None, None)


_norm_mlp.register_autograd(_mlp_gradients, _save_mlp)


def norm_modulate(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """xhat·a + b of the module's equation.

    x: (B, …, C), accepted by `supports`. a, b: (B, C), or (C,) for all images. dtype: of the result, that of x by
    default. Returns the shape of x.
    """
    return _norm_affine(x, a.float(), b.float(), eps, dtype or x.dtype)


def norm_modulate_mlp(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x + w2·gelu(w1·h + b1) + b2, h = xhat·a + b as in `norm_modulate`.

    x: (B, M, C), accepted by `supports_mlp`. w1: (2C, C). b1: (2C,). w2: (C, 2C). b2: (C,). dtype: of the factors of
    matrix products, that of x by default. Returns (B, M, C) in the type of x.
    """
    a, b = (vector.float().expand(x.shape[0], -1) for vector in (a, b))
    w1 = w1.float()
    b1 = b1 + (w1 * b[:, None, :]).sum(2)  # (B, 2C): a sum of products, which no setting for matrices makes coarser
    return _norm_mlp(x, w1 * a[:, None, :], b1, w2.float(), b2.float(), eps, dtype or x.dtype)
