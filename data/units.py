"""The units of fields: models compute with values from -1 to 1, and results have the units of the data again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion.coordinates import size_of
from diffusion.series import on_lattice, series_values

Maps = tuple[tuple[tuple[float, ...], ...], ...]  # (C, H, W)


@dataclass(frozen=True)
class FieldUnits:
    """Values of channel c are mean_c + offset_c + scale_c · x, with x from -1 to 1 over the known training values.

    offset, scale: one for each channel; scale above 0. names: of the channels.
    mean: a map (H, W) for each channel, read by its cosine series between and beside its points; () for none.
    common: the ends of the middle 99 % of the known training values of each channel, for pictures; () for none.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    names: tuple[str, ...]
    mean: Maps = field(default=(), repr=False)
    common: tuple[tuple[float, float], ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        right = all(map(math.isfinite, self.offset)) and all(0 < s < math.inf for s in self.scale)
        if not right or not len(self.offset) == len(self.scale) == len(self.names) > 0:
            raise ValueError(
                f"units have offset {self.offset}, scale {self.scale}; accepted: finite, scale above 0, one per channel"
            )
        maps = torch.tensor(self.mean, dtype=torch.float64)  # a ValueError where rows have different lengths
        if self.mean and (maps.ndim != 3 or len(maps) != len(self.names) or not maps.isfinite().all()):
            raise ValueError(f"units have means {tuple(maps.shape)}; accepted: a finite map for each channel")
        ordered = all(-math.inf < low <= high < math.inf for low, high in self.common)
        if self.common and not (ordered and len(self.common) == len(self.names)):
            raise ValueError(f"units have common values {self.common}; accepted: two finite ones in order per channel")

    def undo(self, x: torch.Tensor, spread: bool = False) -> torch.Tensor:
        """Values (..., C, H, W) in the units of the data, of values in those of the model.

        spread: of deviations, which have no offset.
        """
        scale, offset = self._on(x)
        return (x.double() * scale + (0 if spread else offset)).to(x.dtype)

    def apply_at(self, values: torch.Tensor, places: torch.Tensor, sides: torch.Tensor) -> torch.Tensor:
        """`apply` for values (P, C) at places (P, 2), averaged over sides (P, 2), as `diffusion.sensors` has them."""
        offset, scale = (torch.tensor(v, dtype=torch.float64) for v in (self.offset, self.scale))
        if self.mean:
            maps = torch.tensor(self.mean, dtype=torch.float64)[None]
            offset = offset + series_values(maps, places.double().clamp(0, 1), sides=sides.double())[0].mT
        return (values.double() - offset) / scale

    @property
    def limits(self) -> list[tuple[float, float]]:
        """Lowest and highest value of each channel, about: those of the training fields, without a mean map."""
        ends = [(min(map(min, one)), max(map(max, one))) for one in self.mean] or [(0.0, 0.0)] * len(self.names)
        return [(low + o - s, high + o + s) for (low, high), o, s in zip(ends, self.offset, self.scale)]

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of `undo`: values (..., C, H, W) of fields in the units of the model; NaN stays."""
        scale, offset = self._on(values)
        return ((values.double() - offset) / scale).float()

    def _on(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.ndim < 3 or x.shape[-3] != len(self.scale):
            raise ValueError(f"fields have shape {tuple(x.shape)}; accepted: (..., {len(self.scale)}, H, W)")
        scale, offset = (
            torch.tensor(v, dtype=torch.float64, device=x.device)[:, None, None] for v in (self.scale, self.offset)
        )
        if self.mean:
            maps, size = torch.tensor(self.mean, dtype=torch.float64, device=x.device), size_of(x)
            offset = offset + (maps if size_of(maps) == size else on_lattice(maps[None], size)[0])
        return scale, offset

    @classmethod
    def stored(cls, header: Mapping[str, Any], file: object) -> FieldUnits | None:
        """The units in the header of weights, None for those of images; ValueError naming the file where damaged."""
        known = header.get("units")
        if known is None:
            return None
        try:
            mean = tuple(tuple(tuple(map(float, row)) for row in one) for one in known.get("mean", ()))
            common = tuple((float(low), float(high)) for low, high in known.get("common", ()))
            parts = {name: tuple(map(kind, known[name])) for name, kind in _PARTS.items()}
            return cls(**parts, mean=mean, common=common)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} has no units of fields ({error!r}); accepted: weights as written") from None


_PARTS = {"offset": float, "scale": float, "names": str}
