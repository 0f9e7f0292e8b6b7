"""The orthonormal cosine transform (DCT-II) of images, by matrices or by FFT, whichever is faster at the size.

The DCT-II expands functions on [0, 1] with reflecting boundary: basis function k is cos(πk (i + 1/2) / n) at pixel i.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch.nn.functional import pad

# The transform of an axis costs n² by matrix and n log n by FFT. To mollify an image of three channels takes one
# thread of a server CPU, in milliseconds by matrices / by FFT, 15 / 8 at 512², 122 / 60 at 1024², 7800 / 4900 at 4096²,
# and in a batch, which shares the matrices, 2.1 / 2.4 at 256².
FFT_FROM = 512

# Matrices kept of each kind, at most 2 MB each: training and sampling use one or two sizes.
CACHED_MATRICES = 16


def times_matrix(x: torch.Tensor, matrix_on: Callable[[torch.dtype, torch.device], torch.Tensor]) -> torch.Tensor:
    """x @ matrix over the last axis of x, float32 or float64, to full precision whatever the caller's settings.

    The Wiener filter amplifies the rounding of a mollified image up to tenfold, and TF32 keeps three digits. TF32 can
    be switched off for a whole process only, but never applies to float64, which is what GPUs compute here.
    matrix_on: gives the matrix (n, n) in a dtype and on a device.
    """
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
    """exp(-iπk/2n) for k = 0 … n // 2, in the complex counterpart of dtype."""
    angle = -math.pi / (2 * n) * torch.arange(n // 2 + 1, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle).to(device, dtype.to_complex())


def dct(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal DCT-II over the last axis of x (..., n), float32 or float64."""
    n = x.shape[-1]
    if n < FFT_FROM:
        return times_matrix(x, partial(_cosine_matrix_on, n, False))
    # Makhoul 1980: with even samples ascending, then odd ones descending, a DCT is a real FFT of the same length. Its
    # n // 2 + 1 outputs, rotated, carry coefficient k in the real and coefficient n - k in the negated imaginary part.
    reordered = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    rotated = torch.fft.rfft(reordered) * _twiddles(n, x.dtype, x.device)
    coefficients = torch.cat([rotated.real, -rotated.imag[..., 1 : (n + 1) // 2].flip(-1)], dim=-1) * math.sqrt(2 / n)
    return torch.cat([coefficients[..., :1] * math.sqrt(0.5), coefficients[..., 1:]], dim=-1)


def idct(coefficients: torch.Tensor) -> torch.Tensor:
    """Inverse of `dct`, over the last axis."""
    n = coefficients.shape[-1]
    if n < FFT_FROM:
        return times_matrix(coefficients, partial(_cosine_matrix_on, n, True))
    scaled = torch.cat([coefficients[..., :1] * math.sqrt(2), coefficients[..., 1:]], dim=-1) * math.sqrt(n / 2)
    mirrored = pad(scaled[..., 1:].flip(-1), (1, 0))  # coefficient n - k, none for k = 0
    rotated = torch.complex(scaled[..., : n // 2 + 1], -mirrored[..., : n // 2 + 1])
    interleaved = torch.fft.irfft(rotated * _twiddles(n, coefficients.dtype, coefficients.device).conj(), n=n)
    x = torch.empty_like(interleaved)
    x[..., ::2] = interleaved[..., : (n + 1) // 2]
    x[..., 1::2] = interleaved[..., (n + 1) // 2 :].flip(-1)
    return x


def on_rows(transform: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a transform of the last axis to the second last one."""
    return transform(x.mT).mT
