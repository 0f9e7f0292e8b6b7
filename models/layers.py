"""Layers shared by the networks: time features, attention.

Features carry their channels on the last axis everywhere: (B, M, C) on points, (B, H, W, C) on grids, (B, D) for
vectors. Letters: B batch, C channels, H × W grid, S = H·W tokens, D latent.

Initialisation, here and in every file beside: PyTorch's defaults of `Linear`, `Conv2d` and `LayerNorm`, nothing
special for the last layers, as in the published models. The exceptions are the kernels of `sparse_block.py` and
`spectral.py`, and say so there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from models.operators.dispatch import BackendModule
from models.operators.pointwise.norm_mlp import norm_modulate, product_type

_LOG_PERIOD = math.log(10000.0)


def sinusoidal_features(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Features of the diffusion time for the networks on functions: sines, then cosines.

    sin(t·f_j), cos(t·f_j) with f_j = 10000^(−j/(h−1)), j < h = dim/2.

    t: (B,), in thousandths of the whole process. dim: even, at least 4. Returns float32 (B, dim).
    """
    half = dim // 2
    angles = _angles(t, _steps(t, half) * -(_LOG_PERIOD / (half - 1)))  # (B, h)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def latent_sinusoidal_features(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Features of the diffusion time for the latent network: cosines, then sines, and a zero where `dim` is odd.

    cos(t·f_j), sin(t·f_j) with f_j = 10000^(−j/h), j < h = ⌊dim/2⌋ ≥ 1. Returns float32 (B, dim).
    """
    half = dim // 2
    angles = _angles(t, _steps(t, half) * -_LOG_PERIOD / half)  # (B, h)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def _steps(t: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32, device=t.device)


def _angles(t: torch.Tensor, log_frequencies: torch.Tensor) -> torch.Tensor:
    """t·exp(log_frequencies), float32 (B, h).

    The exponential is rounded from float64: t multiplies the error of a frequency by up to a thousand, and float32
    exponentials differ between processors.
    """
    return t.float()[:, None] * log_frequencies.double().exp().float()


class Dropout(nn.Dropout):
    """`nn.Dropout` of a part of a batch, with the mask that the whole batch would have: dividing it changes nothing.

    Whoever divides a batch sets both attributes.

    batch: number of examples of the whole batch.
    rows: which of them the inputs (B, ...) are, int64 (B,) on their device; None where they are the whole batch.
    """

    batch: int = 0
    rows: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is None or not self.training or self.p == 0:
            return super().forward(x)
        return x * super().forward(x.new_ones(self.batch, *x.shape[1:]))[self.rows]


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with its result in the type of products: autocast on a GPU leaves it, and GELU next, float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).to(product_type(x))


HEAD_WIDTH = 32
ATTENTION_KERNELS = ("sdpa", "flash_attn")


class Attention(BackendModule):
    """Residual attention over all positions of a grid, without positional encoding: x + Linear(softmax(q·k/√32)·v).

    max(⌊C/32⌋, 4) heads of width 32. kernel: "sdpa" (PyTorch), or "flash_attn" (half precision on a GPU only).
    """

    def __init__(self, channels: int, kernel: str = "sdpa"):
        super().__init__()
        if kernel not in ATTENTION_KERNELS:
            raise ValueError(f"model.attention is {kernel!r}; accepted: {', '.join(ATTENTION_KERNELS)}")
        self.attend = _flash_attention() if kernel == "flash_attn" else _sdpa
        self.heads = max(channels // HEAD_WIDTH, 4)
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * self.heads * HEAD_WIDTH)
        self.out = nn.Linear(self.heads * HEAD_WIDTH, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        h = norm_modulate(x, self.norm, plain=self.backend.plain).flatten(1, 2)  # (B, S, C)
        qkv = self.qkv(h).unflatten(2, (3, self.heads, HEAD_WIDTH))  # (B, S, 3, heads, 32)
        h = self.attend(qkv).flatten(2)  # (B, S, heads·32)
        return x + self.out(h).view(x.shape)  # (B, H, W, C)


def _sdpa(qkv: torch.Tensor) -> torch.Tensor:
    """Attention of packed (B, S, 3, heads, width) queries, keys and values: (B, S, heads, width)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, S, width) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flash_attention():
    """The same by the flash_attn package, imported only when asked for."""
    try:
        from flash_attn import flash_attn_qkvpacked_func
    except ImportError as error:
        raise ValueError(
            "model.attention is 'flash_attn', which is not installed; accepted: 'sdpa', or pip install flash-attn"
        ) from error

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        if qkv.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"model.attention is 'flash_attn' for {qkv.dtype}; accepted: 'sdpa', or mixed precision on a GPU"
            )
        return flash_attn_qkvpacked_func(qkv)

    return attend
