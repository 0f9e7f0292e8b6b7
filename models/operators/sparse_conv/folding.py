"""The affine part of a LayerNorm and the modulation after it, as one scale and one shift per image."""

from __future__ import annotations

import torch


def fold(
    gamma: torch.Tensor, beta: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """a, b, float32 (B, C) each, with (n·gamma + beta)·scale + shift = n·a + b.

    gamma, beta: (C,). scale, shift: (B, C), None for 1 and 0. batch: B.
    """
    a, b = gamma.float().expand(batch, -1), beta.float().expand(batch, -1)
    if scale is not None:
        a, b = a * scale, b * scale
    return a, b if shift is None else b + shift
