"""Distances between two sets of features: Fréchet (FID) and kernel (KID), in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of `count` features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int


def gaussian_of(features: torch.Tensor) -> Gaussian:
    """The sample mean and the unbiased sample covariance of features (N, D).

    Raises:
        ValueError: for fewer than two features, or when they are not finite.
    """
    _check(features)
    x = features.double()
    mean = x.mean(dim=0)
    centred = x - mean
    return Gaussian(mean, centred.mT @ centred / (len(x) - 1), len(x))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The Fréchet distance of two Gaussians, |m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½) (Heusel et al. 2017).

    tr (C₁ C₂)^½ = tr (C₁^½ C₂ C₁^½)^½ is the sum of the singular values of A₁ A₂ᵗ for any Aᵢ with Aᵢᵗ Aᵢ = Cᵢ; here
    Aᵢ comes from the eigenvectors of Cᵢ. Nothing can turn complex or fail for singular covariances, and no small
    eigenvalue is squared before its root is taken.

    Raises:
        ValueError: when the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions; accepted: equal dimensions")
    root_trace = torch.linalg.svdvals(_factor(a.covariance) @ _factor(b.covariance).mT).sum()
    difference = (a.mean - b.mean).square().sum()
    return float(difference + a.covariance.trace() + b.covariance.trace() - 2 * root_trace)


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """A (R, D) with Aᵗ A = C, R the numerical rank of C."""
    values, vectors = torch.linalg.eigh(covariance)
    rounding = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    kept = values > rounding
    return values[kept].sqrt()[:, None] * vectors[:, kept].mT


def kernel_distance(
    reference: torch.Tensor, generated: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The kernel distance: unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018), over random subsets.

    Subsets are drawn as clean-fid draws them after `numpy.random.seed(seed)`.

    Args:
        reference, generated: features (N, D), (M, D).
        subsets: number of subsets.
        subset_size: features of either set in a subset, at most; all if there are fewer.
        seed: of the subsets.
    Returns:
        The mean over subsets and its standard error (0 when every subset is the whole).
    Raises:
        ValueError: for fewer than two features, features that are not finite, or different dimensions.
    """
    _check(reference)
    _check(generated)
    if reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of {reference.shape[1]} and {generated.shape[1]} dimensions; accepted: equal dimensions"
        )
    count = min(len(reference), len(generated), subset_size)
    draws = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        y = generated[torch.from_numpy(draws.choice(len(generated), count, replace=False))].double()
        x = reference[torch.from_numpy(draws.choice(len(reference), count, replace=False))].double()
        within = _kernel(x, x) + _kernel(y, y)
        within_mean = (within.sum() - within.trace()) / (count * (count - 1))
        estimates.append(within_mean - 2 * _kernel(x, y).mean())
    values = torch.stack(estimates)
    error = values.std() / subsets**0.5 if subsets > 1 else values.new_zeros(())
    return float(values.mean()), float(error)


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.mT / x.shape[1] + 1) ** 3


def _check(features: torch.Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: {tuple(features.shape)}; accepted: (N, D) of at least 2 images")
    if not features.isfinite().all():
        raise ValueError("features: some are not finite")
