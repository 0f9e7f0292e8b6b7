"""Distances between two sets of features: Fréchet (FID) and kernel (KID), in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_VARIANCE_SIZE = 5000  # images of either set, at most, of which the variance of the kernel distance is computed
_KERNEL_ROWS = 1024  # of the kernel matrix, held at once


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
) -> tuple[float, float | None]:
    """The kernel distance: unbiased MMD² with the kernel k(x, y) = (x·y / D + 1)³ (Bińkowski et al. 2018).

    It is the mean over random subsets, drawn as clean-fid draws them after `numpy.random.seed(seed)`; where a subset is
    the whole of both sets, it is computed once. Its standard error is that over independent sets of as many images,

        error² = variance of the distance of the whole sets + variance over subsets / subsets.

    The first part is how far these images stand for others, the second how far the subsets stand for these images.

    Args:
        reference, generated: features (N, D), (M, D).
        subsets: number of subsets.
        subset_size: features of either set in a subset, at most; all if there are fewer.
        seed: of the subsets.
    Returns:
        The distance and its standard error, None for fewer than four features of either.
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
    if count == max(len(reference), len(generated)):
        subsets = 1
    draws = np.random.RandomState(seed)

    def drawn(x: torch.Tensor, size: int) -> torch.Tensor:
        return x[torch.from_numpy(draws.choice(len(x), size, replace=False))].double()

    # Of the generated features first, as clean-fid does.
    pairs = ((drawn(generated, count), drawn(reference, count)) for _ in range(subsets))
    values = torch.stack([_Sums.of(x, y).distance() for y, x in pairs])
    if min(len(reference), len(generated)) < 4:
        return float(values.mean()), None
    some = (drawn(x, min(len(x), _VARIANCE_SIZE)) for x in (reference, generated))
    variance = _Sums.of(*some).variance(len(reference), len(generated))
    if subsets > 1:
        variance = variance + values.var() / subsets
    return float(values.mean()), float(variance.sqrt())


@dataclass(frozen=True)
class _Block:
    """Sums of the kernel between two sets.

    rows: Σ_j k_ij, (N,). columns: Σ_i k_ij, (M,). squares: Σ_ij k_ij². same: the two are one set, whose pairs i = j
    are left out.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    squares: torch.Tensor
    same: bool

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> _Block:
        """Of x (N, D) and y (M, D); of one set with itself if y is x."""
        rows, columns, squares = [], torch.zeros_like(y[:, 0]), y.new_zeros(())
        for start in range(0, len(x), _KERNEL_ROWS):
            part = x[start : start + _KERNEL_ROWS]
            kernel = (part @ y.mT / x.shape[1] + 1) ** 3
            if y is x:
                kernel[:, start:].fill_diagonal_(0)
            rows.append(kernel.sum(dim=1))
            columns += kernel.sum(dim=0)
            squares += kernel.square().sum()
        return cls(torch.cat(rows), columns, squares, y is x)

    def pair_variance(self) -> torch.Tensor:
        """Unbiased variance of what k(x, y) has beside a part that depends on x and one that depends on y.

        Within a set the sums are centred as those of Székely and Rizzo 2014, equation (2.1).
        """
        n, m, total = len(self.rows), len(self.columns), self.rows.sum()
        if self.same:
            spread = self.squares - 2 / (n - 2) * self.rows.square().sum() + total**2 / ((n - 1) * (n - 2))
            return (spread / (n * (n - 3))).clamp(min=0)
        spread = self.squares - self.rows.square().sum() / m - self.columns.square().sum() / n + total**2 / (n * m)
        return (spread / ((n - 1) * (m - 1))).clamp(min=0)


@dataclass(frozen=True)
class _Sums:
    """Sums of the kernel within x (N, D), within y (M, D) and between them, from which the distance follows."""

    xx: _Block
    yy: _Block
    xy: _Block

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor) -> _Sums:
        """The sums for features in float64."""
        return cls(_Block.of(x, x), _Block.of(y, y), _Block.of(x, y))

    def distance(self) -> torch.Tensor:
        """The unbiased MMD²."""
        n, m = len(self.xy.rows), len(self.xy.columns)
        within = self.xx.rows.sum() / (n * (n - 1)) + self.yy.rows.sum() / (m * (m - 1))
        return within - 2 * self.xy.rows.sum() / (n * m)

    def variance(self, images_x: int, images_y: int) -> torch.Tensor:
        """The variance of the distance of sets with so many images, by the jackknife of these.

        A set's part of the jackknife is (n − 1)/n · Σ_i (d_i − mean d)², d_i the distance without image i. It counts
        the variance that single images cause once, and that of pairs twice. Their own variance tells the two apart:
        the one falls with 1/n, the other with 1/n². Unbiased, but that no negative variance of single images counts.
        """
        n, m = len(self.xy.rows), len(self.xy.columns)
        pairs_x, pairs_y, pairs_xy = (block.pair_variance() for block in (self.xx, self.yy, self.xy))
        single, double = 0.0, 4 * pairs_xy / (images_x * images_y)
        for within, across, pairs, count, others, images in (
            (self.xx.rows, self.xy.rows, pairs_x, n, m, images_x),
            (self.yy.rows, self.xy.columns, pairs_y, m, n, images_y),
        ):
            d = 2 / (count - 1) * (across / others - within / (count - 2))  # up to what all d_i share
            jackknife = (count - 1) / count * (d - d.mean()).square().sum()
            of_pairs = 4 * pairs / (count * (count - 2)) + 4 * pairs_xy / (count * others)
            single = single + (jackknife - of_pairs) * count / images
            double = double + 2 * pairs / (images * (images - 1))
        return single.clamp(min=0) + double


def _check(features: torch.Tensor) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: {tuple(features.shape)}; accepted: (N, D) of at least 2 images")
    if not features.isfinite().all():
        raise ValueError("features: some are not finite")
