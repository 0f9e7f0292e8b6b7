"""The Triton kernels of `triton_norm_mlp`, whose letters they share, and the tiles they are launched with.

Programs are counted by group and image: one takes the tiles group, group + G, … of its image.

Pointers: x, out, dout, dx (B, M, C). a, b: float32 (B, C), or (C,) for all images, the stride between images then being
0; da, db: (B, G, C). w1: float32 (B, 2C, C); dw1: (B, G, 2C, C). b1: (B, 2C); db1: (B, G, 2C). w2: (C, 2C); dw2:
(B, G, C, 2C). b2: (C,); db2: (B, G, C).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _normalise(x, cols, C: tl.constexpr, eps):
    """(x − mean) / √(variance + eps) along axis 1, zero beyond column C, and the reciprocal of that root."""
    centred = x - (tl.sum(x, 1) / C)[:, None]
    centred = tl.where(cols < C, centred, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], rstd


_INTERPRETED = tl.constexpr(not isinstance(_normalise, triton.JITFunction))


@triton.jit
def _normalise_backward(xhat, rstd, gradient, C: tl.constexpr):
    """Gradient of x from that of xhat."""
    along = (tl.sum(gradient * xhat, 1) / C)[:, None]
    return (gradient - (tl.sum(gradient, 1) / C)[:, None] - xhat * along) * rstd[:, None]


@triton.jit
def norm_forward(x_ptr, a_ptr, b_ptr, out_ptr, M, stride, eps, C: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    image, rows = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    inside = (rows < M) & (cols < C)
    offsets = (image.to(tl.int64) * M + rows) * C + cols
    x = tl.load(x_ptr + offsets, inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + image * stride + cols, cols < C, other=0.0)
    b = tl.load(b_ptr + image * stride + cols, cols < C, other=0.0)
    xhat, _ = _normalise(x, cols, C, eps)
    tl.store(out_ptr + offsets, (xhat * a + b).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def norm_backward(
    x_ptr,
    a_ptr,
    dout_ptr,
    dx_ptr,
    da_ptr,
    db_ptr,
    M,
    stride,
    eps,
    C: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    group, image = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, COLS)[None, :]
    a = tl.load(a_ptr + image * stride + cols, cols < C, other=0.0)
    da, db = tl.zeros((ROWS, COLS), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for tile in range(group, tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (rows < M) & (cols < C)
        offsets = (image.to(tl.int64) * M + rows) * C + cols
        x = tl.load(x_ptr + offsets, inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + offsets, inside, other=0.0).to(tl.float32)
        xhat, rstd = _normalise(x, cols, C, eps)
        da += dout * xhat
        db += dout
        dx = _normalise_backward(xhat, rstd, dout * a, C)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), inside)
    partial = (image * tl.num_programs(0) + group) * C + tl.arange(0, COLS)
    tl.store(da_ptr + partial, tl.sum(da, 0), tl.arange(0, COLS) < C)
    tl.store(db_ptr + partial, tl.sum(db, 0), tl.arange(0, COLS) < C)


@triton.jit
def _gaussian(u):
    """Distribution function and density of the standard normal distribution at u.

    The former by Abramowitz and Stegun 7.1.26, to 1e-7: the exponential it needs is that of the density.
    """
    e = tl.exp2(u * u * -0.7213475204444817)  # exp(−u²/2)
    t = 1.0 / (1.0 + 0.23164190 * tl.abs(u))
    series = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    tail = series * e
    return tl.where(u > 0, 1.0 - tail, tail), e * 0.3989422804014327


@triton.jit
def _dot(left, right, DTYPE: tl.constexpr, accumulator=None):
    """accumulator + left·right, the factors rounded to DTYPE, the sum float32."""
    left, right = left.to(DTYPE), right.to(DTYPE)
    if _INTERPRETED:  # whose products of bfloat16 numbers are wrong
        left, right = left.to(tl.float32), right.to(tl.float32)
    if accumulator is None:
        product = tl.dot(left, right, input_precision="ieee")
    else:
        product = tl.dot(left, right, accumulator, input_precision="ieee")
    return product


@triton.jit
def mlp_forward(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, out_ptr, M, eps, C: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr
):
    group, image = tl.program_id(0), tl.program_id(1)
    cols, hidden = tl.arange(0, C)[None, :], tl.arange(0, 2 * C)[None, :]
    w1 = tl.load(w1_ptr + (image * 2 * C + hidden.T) * C + cols).to(DTYPE)  # (2C, C)
    w2 = tl.load(w2_ptr + cols.T * (2 * C) + hidden).to(DTYPE)  # (C, 2C)
    b1, b2 = tl.load(b1_ptr + image * 2 * C + hidden), tl.load(b2_ptr + cols)
    for tile in range(group, tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        offsets = (image.to(tl.int64) * M + rows) * C + cols
        x = tl.load(x_ptr + offsets, rows < M, other=0.0).to(tl.float32)
        xhat, _ = _normalise(x, cols, C, eps)
        u = _dot(xhat, w1.T, DTYPE) + b1  # (ROWS, 2C)
        cdf, _ = _gaussian(u)
        out = _dot(u * cdf, w2.T, DTYPE) + (x + b2)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), rows < M)


@triton.jit
def mlp_backward(
    x_ptr, w1_ptr, b1_ptr, w2_ptr, dout_ptr, dx_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, M, eps,
    C: tl.constexpr, ROWS: tl.constexpr, DTYPE: tl.constexpr,
    CHUNK: tl.constexpr, INPUT: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The gradient of x (INPUT, which needs CHUNK = 2C), or of the weights of a chunk of hidden channels, or both."""
    group, image = tl.program_id(0), tl.program_id(1)
    cols, hidden = tl.arange(0, C)[None, :], tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)[None, :]
    w1 = tl.load(w1_ptr + (image * 2 * C + hidden.T) * C + cols).to(DTYPE)  # (CHUNK, C)
    w2 = tl.load(w2_ptr + cols.T * (2 * C) + hidden).to(DTYPE)  # (C, CHUNK)
    b1 = tl.load(b1_ptr + image * 2 * C + hidden)
    dw1, dw2 = tl.zeros((CHUNK, C), tl.float32), tl.zeros((C, CHUNK), tl.float32)
    db1, db2 = tl.zeros((ROWS, CHUNK), tl.float32), tl.zeros((ROWS, C), tl.float32)
    for tile in range(group, tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None]
        offsets = (image.to(tl.int64) * M + rows) * C + cols
        x = tl.load(x_ptr + offsets, rows < M, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + offsets, rows < M, other=0.0)
        xhat, rstd = _normalise(x, cols, C, eps)
        u = _dot(xhat, w1.T, DTYPE) + b1  # (ROWS, CHUNK)
        cdf, density = _gaussian(u)
        du = _dot(dout, w2, DTYPE) * (cdf + u * density)
        if WEIGHTS:
            dw1 = _dot(du.to(DTYPE).T, xhat, DTYPE, dw1)
            dw2 = _dot(dout.to(DTYPE).T, u * cdf, DTYPE, dw2)
            db1 += du
            db2 += dout.to(tl.float32)
        if INPUT:
            dxhat = _dot(du, w1, DTYPE)
            dx = dout.to(tl.float32) + _normalise_backward(xhat, rstd, dxhat, C)
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), rows < M)
    if WEIGHTS:
        partial = image * tl.num_programs(0) + group
        tl.store(dw1_ptr + (partial * 2 * C + hidden.T) * C + cols, dw1)
        tl.store(dw2_ptr + (partial * C + cols.T) * (2 * C) + hidden, dw2)
        tl.store(db1_ptr + partial * 2 * C + hidden, tl.sum(db1, 0)[None, :])
        if tl.program_id(2) == 0:
            tl.store(db2_ptr + partial * C + cols, tl.sum(db2, 0)[None, :])


MAX_CHANNELS = 4096
KINDS = {  # of tiles, by the types of the features and of the factors of matrix products
    (torch.float32, torch.float32): "full",
    (torch.float32, torch.bfloat16): "mixed",
    (torch.float32, torch.float16): "mixed",
    (torch.bfloat16, torch.bfloat16): "half",
    (torch.float16, torch.float16): "half",
}


@dataclass(frozen=True)
class Tile:
    """Rows and warps of the two kernels of an MLP, chosen so that no register spills on compute capability 9.0.

    (Before Triton 3.5 some hundred bytes do, in three of the backward kernels.)

    chunk: hidden channels whose weights' gradients one program accumulates in registers; if that is all 2C, the same
    program takes the gradient of x. stages: of the loads from memory, 1 for none ahead of time. shared: bytes of
    shared memory that the kernels take at most, in Triton 3.3 to 3.9.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    chunk: int
    stages: int
    shared: int


TILES = {
    (16, "half"): Tile((64, 4), (64, 4), 32, 3, 16 << 10),
    (16, "mixed"): Tile((64, 4), (64, 4), 32, 3, 24 << 10),
    (16, "full"): Tile((32, 4), (32, 4), 32, 1, 16 << 10),
    (32, "half"): Tile((64, 4), (16, 4), 64, 3, 21 << 10),
    (32, "mixed"): Tile((64, 4), (16, 4), 64, 3, 33 << 10),
    (32, "full"): Tile((16, 4), (16, 8), 64, 1, 24 << 10),
    (64, "half"): Tile((32, 4), (32, 8), 128, 3, 84 << 10),
    (64, "mixed"): Tile((32, 4), (16, 8), 128, 3, 76 << 10),
    (64, "full"): Tile((16, 8), (16, 8), 64, 1, 76 << 10),
    (128, "half"): Tile((32, 8), (16, 8), 64, 1, 208 << 10),
    (128, "mixed"): Tile((32, 8), (16, 8), 64, 1, 208 << 10),
}


_FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}  # whose default differs between versions of Triton


@lru_cache
def norm_options(channels: int) -> dict[str, Any]:
    cols = triton.next_power_of_2(channels)
    return {"C": channels, "COLS": cols, "ROWS": max(2048 // cols, 1), "num_warps": 4, **_FUSED_MULTIPLY_ADD}


@lru_cache
def mlp_options(channels: int, features: torch.dtype, factors: torch.dtype) -> tuple[dict, list[dict[str, Any]]]:
    """Options of the forward launch and of the backward launches."""
    tile = TILES[channels, KINDS[features, factors]]
    dtype = getattr(tl, str(factors).removeprefix("torch."))
    common = {"C": channels, "DTYPE": dtype, "num_stages": tile.stages, **_FUSED_MULTIPLY_ADD}
    forward = {**common, "ROWS": tile.forward[0], "num_warps": tile.forward[1]}
    common |= {"ROWS": tile.backward[0], "num_warps": tile.backward[1]}
    if tile.chunk == 2 * channels:
        return forward, [{**common, "CHUNK": tile.chunk, "INPUT": True, "WEIGHTS": True}]
    return forward, [
        {**common, "CHUNK": 2 * channels, "INPUT": True, "WEIGHTS": False},
        {**common, "CHUNK": tile.chunk, "INPUT": False, "WEIGHTS": True},
    ]
