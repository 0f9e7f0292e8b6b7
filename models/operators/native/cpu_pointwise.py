"""Norm, modulation and MLP of the residual block on a CPU, fused in C (`pointwise.c`).

Letters: B batch, M points, C channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from models.operators.native import compiled, memory
from models.operators.native.folding import fold

_LANES, _MOST_CHANNELS = 16, 128  # of pointwise.c
_CHUNK = 512  # rows whose gradients are summed before they are rounded to a partial sum, at least
_MOST_PARTS = 64  # partial sums, which bounds their memory


def supports(x: torch.Tensor) -> bool:
    """Whether `norm_modulate` takes these features."""
    channels = x.shape[-1]
    shaped = channels % _LANES == 0 and channels <= _MOST_CHANNELS and x.numel() > 0
    return x.device.type == "cpu" and x.dtype == torch.float32 and shaped and compiled.library() is not None


def supports_mlp(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `norm_modulate_mlp` takes these features with products of this type."""
    return dtype == torch.float32 and supports(x)


def norm_modulate(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """LayerNorm(x)·scale + shift, with the affine part gamma, beta of the LayerNorm.

    x: (B, M, C), accepted by `supports`. gamma, beta: (C,). scale, shift: (B, C), None for 1 and 0. dtype: of the
    result. Differentiable in all tensors.
    """
    return _norm_affine(x, *fold(gamma, beta, scale, shift, x.shape[0]), eps).to(dtype)


def norm_modulate_into(out: torch.Tensor, x: torch.Tensor, *parameters: torch.Tensor | None, eps: float) -> None:
    """`norm_modulate` written to `out`, without gradients; both contiguous. The parameters are the same."""
    gamma, beta, scale, shift = parameters
    _call_norm(x, *fold(gamma, beta, scale, shift, x.shape[0]), eps, out)


def norm_modulate_mlp(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x + W₂·gelu(W₁·h + b₁) + b₂ with h of `norm_modulate`; w1: (2C, C), w2: (C, 2C).

    x: (B, M, C), accepted with `dtype` by `supports_mlp`. Differentiable in all tensors.
    """
    return _mlp(x, *fold(gamma, beta, scale, shift, x.shape[0]), w1, b1, w2, b2, eps)


def norm_modulate_mlp_(x: torch.Tensor, *parameters: torch.Tensor | None, eps: float) -> None:
    """`norm_modulate_mlp` in place, without gradients; x: contiguous. The other arguments are the same."""
    gamma, beta, scale, shift, *mlp = parameters
    _call_mlp(x, *fold(gamma, beta, scale, shift, x.shape[0]), *mlp, eps, out=x)


def join_(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """x ← weight·[x, skip] + bias in place, without gradients.

    x: (B, M, C), contiguous, accepted by `supports`. skip: like x. weight: (C, 2C). bias: (C,).
    """
    channels = x.shape[2]
    tensors = (skip.contiguous(), weight.t().contiguous(), bias.contiguous())
    compiled.call("infty_join", x, *tensors, x.numel() // channels, channels)


@lru_cache
def _number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


def _parts(batch: int, points: int) -> tuple[int, int]:
    """How many chunks the rows of an image fall into, and the rows of each."""
    parts = max(1, min(-(-points // _CHUNK), _MOST_PARTS // batch))
    return parts, -(-points // parts)


@torch.library.custom_op("infty_diff::norm_affine_cpu", mutates_args=())
def _norm_affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
    x, out = x.contiguous(), memory.empty(*x.shape)
    _call_norm(x, scale, shift, eps, out)
    return out


def _call_norm(x, scale, shift, eps, out) -> None:
    compiled.call("infty_norm_modulate", x, scale.contiguous(), shift.contiguous(), _number(eps), *x.shape, out)


@torch.library.custom_op("infty_diff::norm_affine_cpu_backward", mutates_args=())
def _norm_affine_backward(
    dh: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dh, x, scale, shift = dh.contiguous(), x.contiguous(), scale.contiguous(), shift.contiguous()
    batch, points, channels = x.shape
    parts, chunk = _parts(batch, points)
    dx, sums = memory.empty(*x.shape), x.new_zeros(2, batch, parts, channels)
    sizes = (batch, points, channels, parts, chunk)
    compiled.call("infty_norm_modulate_backward", dh, x, scale, shift, _number(eps), *sizes, dx, sums[0], sums[1])
    dscale, dshift = sums.sum(2).unbind()
    return dx, dscale.clone(), dshift.clone()


@torch.library.custom_op("infty_diff::mlp_cpu", mutates_args=())
def _mlp(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    x, out = x.contiguous(), memory.empty(*x.shape)
    _call_mlp(x, scale, shift, w1, b1, w2, b2, eps, out)
    return out


def _call_mlp(x, scale, shift, w1, b1, w2, b2, eps, out) -> None:
    """The kernel, which has read a row before it writes it: out may be x."""
    tensors = (scale, shift, w1.t(), b1, w2.t(), b2)
    sizes = (*x.shape, *_parts(*x.shape[:2]))
    compiled.call("infty_mlp", x, *(t.contiguous() for t in tensors), _number(eps), *sizes, out)


@torch.library.custom_op("infty_diff::mlp_cpu_backward", mutates_args=())
def _mlp_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    eps: float,
) -> list[torch.Tensor]:
    """Gradients of x, scale, shift, w1, b1, w2, b2."""
    dout, x = dout.contiguous(), x.contiguous()
    batch, points, channels = x.shape
    parts, chunk = _parts(batch, points)
    shapes = (w1.shape, w2.shape, b1.shape, (channels,), (channels,), (channels,))
    lengths = [torch.Size(shape).numel() for shape in shapes]
    dx, sums = memory.empty(*x.shape), x.new_zeros(batch, parts, sum(lengths))
    tensors = (t.contiguous() for t in (scale, shift, w1.t(), b1, w1, w2))
    sizes = (batch, points, channels, parts, chunk)
    compiled.call("infty_mlp_backward", dout, x, *tensors, _number(eps), *sizes, dx, sums)
    dw1, dw2, db1, db2, dscale, dshift = sums.sum(1).split(lengths, dim=1)  # (B, …) each
    dw1, dw2, db1, db2 = (d.sum(0).view(shape) for d, shape in zip((dw1, dw2, db1, db2), shapes))
    return [dx, dscale.clone(), dshift.clone(), dw1, db1, dw2, db2]


@_norm_affine.register_fake
def _(x, scale, shift, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_norm_affine_backward.register_fake
def _(dh, x, scale, shift, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(scale), torch.empty_like(shift)


@_mlp.register_fake
def _(x, scale, shift, w1, b1, w2, b2, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_mlp_backward.register_fake
def _(dout, x, scale, shift, w1, b1, w2, eps):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [dx, *(torch.empty_like(t) for t in (scale, shift, w1, b1, w2)), x.new_empty(x.shape[2])]


def _save_all(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_affine_gradients(ctx, dh):
    return (*_norm_affine_backward(dh, *ctx.saved_tensors, ctx.eps), None)


def _mlp_gradients(ctx, dout):
    *tensors, _ = ctx.saved_tensors  # all but b2
    return (*_mlp_backward(dout, *tensors, ctx.eps), None)


_norm_affine.register_autograd(_norm_affine_gradients, setup_context=_save_all)
_mlp.register_autograd(_mlp_gradients, setup_context=_save_all)
