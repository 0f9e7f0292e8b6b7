"""The orthonormal cosine transform (DCT-II) of lattices, by matrices or by FFT, whichever is faster at the
size.

The DCT-II is the basis of functions on [0, 1] with reflecting boundary: basis function k is cos(π k (i + 1/2)
/ n) at pixel i."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch

# One transform of n pixels costs n² by matrix and n log n by FFT. One thread of a server CPU, float32,
# milliseconds for the two-axis filter of three channels by matrices / FFT: 1024: 129 / 147, 2048: 1013 / 623,
# 4096: 9149 / 4002.
FFT_FROM = 2048

# Matrices kept of each kind. Training and sampling use one or two sizes; the largest, 2047 pixels in float64,
# takes 34 MB.
CACHED_MATRICES = 16


def times_matrix(x: torch.Tensor, matrix_on: Callable[[torch.dtype, torch.device], torch.Tensor]) -> torch.Tensor:
    """x @ matrix over the last axis of x, float32 or float64, to full precision whatever the caller's
    settings.

    The Wiener filter amplifies the rounding of a mollified image up to tenfold, and TF32 keeps three digits.
    TF32 can only be switched off for the whole process, but it never applies to float64: on a GPU the product
    is taken in float64."""
    dtype = torch.float64 if x.is_cuda else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(dtype) @ matrix_on(dtype, x.device)).to(x.dtype)


def cosine_matrix(n: int) -> torch.Tensor:
    """The DCT-II as an orthogonal matrix, float64 (n, n), row k the k-th basis function."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * torch.outer(k, k + 0.5)) * math.sqrt(2 / n)
    matrix[0] *= math.sqrt(0.5)
    return matrix


@lru_cache(maxsize=CACHED_MATRICES)
def _cosine_matrix_on(n: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix that transforms rows, x @ matrix: the transposed DCT, or for the inverse the DCT itself."""
    matrix = cosine_matrix(n)
    return (matrix if inverse else matrix.mT).to(device, dtype)


@lru_cache(maxsize=CACHED_MATRICES)
def _twiddles(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """exp(-iπk/2n) with the normalisation of the k-th coefficient, complex (n // 2 + 1,)."""
    angle = -math.pi / (2 * n) * torch.arange(n // 2 + 1, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(
        device, torch.complex128 if dtype == torch.float64 else torch.complex64
    )


def dct(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal DCT-II over the last axis of x (..., n), float32 or float64."""
    n = x.shape[-1]
    if n < FFT_FROM:
        return times_matrix(x, partial(_cosine_matrix_on, n, False))
    # Makhoul 1980: even samples ascending, then odd ones descending, turn a DCT into a real FFT of the same
    # length, whose n // 2 + 1 rotated outputs carry coefficient k in the real and coefficient n - k in the
    # negated imaginary part.
    rotated = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)) * _twiddles(
        n, x.dtype, x.device
    )
    coefficients = torch.cat([rotated.real, -rotated.imag[..., 1 : (n + 1) // 2].flip(-1)], dim=-1) * math.sqrt(2 / n)
    return torch.cat([coefficients[..., :1] * math.sqrt(0.5), coefficients[..., 1:]], dim=-1)


def idct(coefficients: torch.Tensor) -> torch.Tensor:
    """Inverse of `dct`, over the last axis."""
    n = coefficients.shape[-1]
    if n < FFT_FROM:
        return times_matrix(coefficients, partial(_cosine_matrix_on, n, True))
    scaled = torch.cat([coefficients[..., :1] * math.sqrt(2), coefficients[..., 1:]], dim=-1) * math.sqrt(n / 2)
    mirrored = torch.nn.functional.pad(scaled[..., 1:].flip(-1), (1, 0))[
        ..., : n // 2 + 1
    ]  # coefficient n - k, none for k = 0
    rotated = torch.complex(scaled[..., : n // 2 + 1], -mirrored)
    interleaved = torch.fft.irfft(rotated * _twiddles(n, coefficients.dtype, coefficients.device).conj(), n=n)
    x = torch.empty_like(interleaved)
    x[..., ::2] = interleaved[..., : (n + 1) // 2]
    x[..., 1::2] = interleaved[..., (n + 1) // 2 :].flip(-1)
    return x


def on_rows(transform: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a transform of the last axis to the second last one."""
    return transform(x.mT).mT
