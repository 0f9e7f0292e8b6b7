"""Processes, denoisers whose answers are known, and scipy's cosine transform, for the tests of the diffusion."""

import numpy as np
import scipy.fft
import torch

from diffusion.mollifier import Mollifier
from diffusion.process import Denoised, Denoiser, DiffusionProcess, Prediction, Variance
from diffusion.schedules import Schedule

TRAIN_SIZE = (8, 8)


def process_of(
    prediction: Prediction = Prediction.MOLLIFIED_EPS,
    variance: Variance = Variance.FIXED_LARGE,
    *,
    sigma: float = 1.0,
    size: tuple[int, int] = TRAIN_SIZE,
    steps: int = 1000,
) -> DiffusionProcess:
    """The process of the cosine schedule."""
    return DiffusionProcess(Schedule.create("cosine", steps), Mollifier(sigma, size), prediction, variance)


def denoiser_of(process: DiffusionProcess, estimate) -> Denoiser:
    """A denoiser that sees `estimate(x_t, ᾱ_t)` as T x_0."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Denoised:
        alpha_bar = process.schedule.at("alpha_bar", t, x_t)
        smooth = estimate(x_t, alpha_bar)
        noise = (x_t - alpha_bar.sqrt() * smooth) / (1 - alpha_bar).sqrt()
        return Denoised(smooth, noise.to(x_t.dtype), process.log_variance(None, t, x_t))

    return denoise


def knows_the_image(process: DiffusionProcess, smooth: torch.Tensor) -> Denoiser:
    """The denoiser of a data set of one image: it sees T x_0 whatever the state."""
    return denoiser_of(process, lambda x_t, alpha_bar: smooth)


def two_modes(process: DiffusionProcess, spread: float = 0.3) -> Denoiser:
    """The optimal denoiser of an even mixture of normals at ±1: not linear, so that the order of steps matters."""

    def estimate(x_t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        signal, variance = alpha_bar.sqrt(), alpha_bar * spread**2 + 1 - alpha_bar
        mode = torch.tanh(signal * x_t / variance)
        return mode + signal * spread**2 / variance * (x_t - signal * mode)

    return denoiser_of(process, estimate)


def coefficients(x: torch.Tensor) -> np.ndarray:
    """Orthonormal cosine coefficients of images (..., H, W), in double precision."""
    return scipy.fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")


def image(coefficients: np.ndarray) -> torch.Tensor:
    """The inverse of `coefficients`."""
    return torch.from_numpy(scipy.fft.idctn(coefficients, axes=(-2, -1), norm="ortho"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
