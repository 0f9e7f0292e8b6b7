"""Conditioning of normalised features on time and latent, of all blocks of a network together.

Behind the norm of a block, features are modulated: h ↦ (h·(1 + scale(e)) + shift(e))·(1 + g(z)). All blocks see the
same e and z, so their layers of one width are computed as one. With the affine part γ, β of the norm, what a block gets
is one scale and one shift per image,

    a = γ·(1 + g(z))·(1 + scale(e)),    b = β·(1 + g(z))·(1 + scale(e)) + shift(e)·(1 + g(z)).

Letters: B batch, C channels, D latent, n modulations of one width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.operators.pointwise.norm_mlp import Affine


class Modulation(nn.Module):
    """The layers of one modulation, which `Conditioning` computes.

    (scale, shift) = Linear(GELU(e)); g = Linear, GELU, Linear. Either part is left out when its width is None.
    """

    def __init__(self, channels: int, time_dim: int | None, z_dim: int | None):
        super().__init__()
        self.time = nn.Sequential(nn.GELU(), nn.Linear(time_dim, 2 * channels)) if time_dim else None
        self.z = nn.Sequential(nn.Linear(z_dim, channels), nn.GELU(), nn.Linear(channels, channels)) if z_dim else None


class _Group(NamedTuple):
    """The modulations of one width.

    places: theirs among all. scale, shift: γ·(1 + g(z)) and β·(1 + g(z)), (n, B or 1, C). factor: 1 + g(z), (n, B, C).
    weight, bias: of the layers of time side by side, (n·2C, time_dim) and (n·2C,).
    """

    places: list[int]
    scale: torch.Tensor
    shift: torch.Tensor
    factor: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


class Conditioning:
    """What evaluations of a network with the same latents share: all that does not depend on time.

    modulated: the norms and what modulates their results, all with the same widths of time and latent, one at least.
    z: (B, D), or None without latents.
    """

    def __init__(self, modulated: Sequence[tuple[nn.LayerNorm, Modulation]], z: torch.Tensor | None) -> None:
        self.shape, self._count = None if z is None else tuple(z.shape), len(modulated)
        places: dict[int, list[int]] = {}
        for place, (norm, _) in enumerate(modulated):
            places.setdefault(norm.weight.shape[0], []).append(place)
        self._groups = [_group(group, [modulated[place] for place in group], z) for group in places.values()]

    def __call__(self, e: torch.Tensor | None) -> list[Affine]:
        """a and b of every norm, in their order. e: (B, time_dim)."""
        found: list[Affine | None] = [None] * self._count
        e = None if e is None else F.gelu(e)
        for places, scale, shift, factor, weight, bias in self._groups:
            if weight is not None:
                of_time = _at_least_float32(F.linear(e, weight, bias)).unflatten(1, (len(places), 2, -1))
                more, added = of_time.permute(2, 1, 0, 3)  # (n, B, C) each
                scale, shift = torch.addcmul(scale, scale, more), torch.addcmul(shift, shift, more)
                shift = shift + added if factor is None else torch.addcmul(shift, added, factor)
            for place, affine in zip(places, zip(scale.unbind(), shift.unbind())):
                found[place] = affine
        return found


def _group(places: list[int], modulated: list[tuple[nn.LayerNorm, Modulation]], z: torch.Tensor | None) -> _Group:
    norms, modulations = zip(*modulated)
    scale, shift = (
        _at_least_float32(torch.stack([getattr(norm, name) for norm in norms])).unsqueeze(1)
        for name in ("weight", "bias")
    )  # (n, 1, C)
    factor = weight = bias = None
    if modulations[0].z is not None:
        first, _, second = zip(*(modulation.z for modulation in modulations))
        hidden = F.gelu(F.linear(z, *_joined(torch.cat, first))).unflatten(1, (len(places), -1))  # (B, n, C)
        weights, biases = _joined(torch.stack, second)  # (n, C, C), (n, C)
        factor = 1 + _at_least_float32(torch.baddbmm(biases.unsqueeze(1), hidden.transpose(0, 1), weights.mT))
        scale, shift = scale * factor, shift * factor
    if modulations[0].time is not None:
        weight, bias = _joined(torch.cat, [modulation.time[1] for modulation in modulations])
    return _Group(places, scale, shift, factor, weight, bias)


def _joined(join, layers: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor]:
    return join([layer.weight for layer in layers]), join([layer.bias for layer in layers])


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
