"""Averages of weights whose length is chosen after training: power functions of time, and sums of them.

The average with exponent γ weighs the weights θ(τ) of time τ by τ^γ,

    θ̄_γ(t) = ∫₀ᵗ p(τ) θ(τ) dτ,   p_{γ,t}(τ) = (γ + 1) τ^γ / t^{γ+1}   for 0 ≤ τ ≤ t.

Its length is the standard deviation of p in units of t, σ_rel. Averages of two lengths, stored at several times, span
those of other lengths nearly.

Source: Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

LONGEST = 1 / math.sqrt(12)  # the length of a uniform average, γ = 0
# Directions of the profiles' span that are this much weaker than the strongest carry the rounding of stored averages.
_WEAKEST = 1e-10


def length(exponent: float) -> float:
    """σ_rel = √(γ + 1) / ((γ + 2) √(γ + 3)) of the exponent γ ≥ 0."""
    return math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3))


def exponent(length: float) -> float:
    """The γ ≥ 0 whose length is `length`, by Newton's method on the cubic γ³ + 7γ² + (16 − σ_rel⁻²)γ + 12 − σ_rel⁻².

    Raises:
        ValueError: when the length is not above 0 and at most 1/√12.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"the length of an average is {length}; accepted: above 0, at most {LONGEST:.4f}")
    inverse = length**-2
    gamma, previous = 1 / length, math.inf  # above the largest root, from where the iteration descends to it
    while gamma < previous:
        value = ((gamma + 7) * gamma + 16 - inverse) * gamma + 12 - inverse
        previous, gamma = gamma, gamma - value / ((3 * gamma + 14) * gamma + 16 - inverse)
    return max(0.0, previous)


def newest_weight(exponent: float, n: int) -> float:
    """The weight 1 − (1 − 1/n)^{γ+1} of the newest of n weights, so that θ̄ ← θ̄ + weight · (θ − θ̄) at update n ≥ 1.

    The i-th of n weights then has ∫ p over (i − 1, i], exactly.
    """
    return 1.0 if n == 1 else -math.expm1((exponent + 1) * math.log1p(-1 / n))


def combination(
    times: Sequence[float], exponents: Sequence[float], time: float, exponent: float
) -> tuple[torch.Tensor, float]:
    """How averages are summed to give one of another length, by least squares on their profiles.

    Args:
        times, exponents: of the N averages that there are; times above 0.
        time, exponent: of the average that is wanted.
    Returns:
        N coefficients, float64, with sum 1; and how far their profile is from that wanted, ‖Σ xᵢ pᵢ − p‖ / ‖p‖.
    """
    t = torch.tensor([*times, time], dtype=torch.float64) / time
    gamma = torch.tensor([*exponents, exponent], dtype=torch.float64)
    products = _inner_products(t, gamma)
    gram, wanted, norm = products[:-1, :-1], products[:-1, -1:], products[-1, -1]
    coefficients = torch.linalg.lstsq(gram, wanted, rcond=_WEAKEST, driver="gelsd").solution
    coefficients = coefficients / coefficients.sum()
    square = norm - 2 * (coefficients * wanted).sum() + (coefficients * (gram @ coefficients)).sum()
    return coefficients[:, 0], math.sqrt(max(0.0, float(square / norm)))


def _inner_products(t: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """∫ pᵢ pⱼ dτ of all pairs of profiles, float64 (N, N)."""
    rows, cols = gamma[:, None] + 1, gamma[None, :] + 1
    later = torch.where(t[:, None] > t[None, :], gamma[:, None], gamma[None, :])
    first, last = torch.minimum(t[:, None], t[None, :]), torch.maximum(t[:, None], t[None, :])
    return rows * cols / (rows + cols - 1) * (first / last) ** later / last
