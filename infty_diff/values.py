"""Values of drawn functions at any points: methods of `InftyDiff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from diffusion.coordinates import Size
from diffusion.series import series_values

if TYPE_CHECKING:
    from infty_diff.model import InftyDiff


def evaluate(
    model: InftyDiff,
    samples: torch.Tensor,
    coordinates: torch.Tensor,
    order: tuple[int, int] = (0, 0),
    *,
    inv_snr: float | str | None = None,
    band: Size | None = None,
) -> torch.Tensor:
    """Values (B, C, P) of sampled functions at points, or derivatives, by their cosine series (`diffusion.series`).

    Args:
        samples: (B, C, H, W): mollified images T x_0, from `sample(deblur=False)`, or images.
        coordinates: (P, 2) or (B, P, 2), y then x in [0, 1]; pixel (i, j) is at ((i + ½)/H, (j + ½)/W).
        order: how often to derive along y and x, at most twice in all.
        inv_snr: undo the mollifier first, as in `SamplingOptions`; None takes the samples as they are.
        band: (h, w), to leave out what a lattice of this size does not hold.
    Raises:
        ValueError: for other shapes, points outside the unit square, values that are not finite.
    """
    device = model.device
    samples, coordinates = torch.as_tensor(samples, device=device), torch.as_tensor(coordinates, device=device)
    return series_values(samples if inv_snr is None else model.deblur(samples, inv_snr), coordinates, order, band)
