"""Precision and recall of generated images by nearest neighbours in feature space."""

from __future__ import annotations

import torch

_CHUNK = 1 << 25  # distances held at once


def precision_recall(reference: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations (1) and (2)).

    The manifold of a set is the union of the balls around its features that reach to the k-th nearest other feature
    of the set. Precision is the fraction of the generated features that lie in the manifold of the reference. Recall is
    the fraction of the reference features that lie in that of the generated.

    Args:
        reference, generated: features (N, D), (M, D); equal numbers make the two comparable.
        k: neighbours, fewer than the features of either set.
    Raises:
        ValueError: when a set has no more than k features, or the dimensions differ.
    """
    if min(len(reference), len(generated)) <= k:
        raise ValueError(f"features: {len(reference)} and {len(generated)}; accepted: more than k={k} of each")
    if reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of {reference.shape[1]} and {generated.shape[1]} dimensions; accepted: equal dimensions"
        )
    centre = reference.double().mean(dim=0)  # distances computed by products lose digits far from the origin
    real, made = reference.double() - centre, generated.double() - centre
    return _covered(made, real, _radii(real, k)), _covered(real, made, _radii(made, k))


def _radii(x: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of each of (N, D) to its k-th nearest other one, (N,)."""
    radii = []
    for start, distances in _distances(x, x):
        own = torch.arange(len(distances), device=x.device)
        distances[own, start + own] = torch.inf
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _covered(queries: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor) -> float:
    """Fraction of the queries that lies in some closed ball."""
    inside = sum(int((distances <= radii).any(dim=1).sum()) for _, distances in _distances(queries, centres))
    return inside / len(queries)


def _distances(x: torch.Tensor, y: torch.Tensor):
    """(first row, squared distances of some rows of x to all of y), one part after the other."""
    norms = y.square().sum(dim=1)
    rows = max(1, _CHUNK // len(y))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        squared = part.square().sum(dim=1)[:, None] + norms - 2 * part @ y.mT
        yield start, squared.clamp(min=0)
