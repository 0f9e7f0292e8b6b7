"""The units of fields: models compute with values from -1 to 1, and results have the units of the data again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class FieldUnits:
    """Values of channel c are offset_c + scale_c · x, with x from -1 to 1 over the known values of the training fields.

    offset, scale: one for each channel; scale above 0. names: of the channels.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        right = all(map(math.isfinite, self.offset)) and all(0 < s < math.inf for s in self.scale)
        if not right or not len(self.offset) == len(self.scale) == len(self.names) > 0:
            raise ValueError(
                f"units have offset {self.offset}, scale {self.scale}; accepted: finite, scale above 0, one per channel"
            )

    def undo(self, x: torch.Tensor, spread: bool = False) -> torch.Tensor:
        """Values (..., C, H, W) in the units of the data, of values in those of the model.

        spread: of deviations, which have no offset.
        """
        scale, offset = self._on(x)
        return (x.double() * scale + (0 if spread else offset)).to(x.dtype)

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
        return scale, offset

    @classmethod
    def stored(cls, header: Mapping[str, Any], file: object) -> FieldUnits | None:
        """The units in the header of weights, None for those of images; ValueError naming the file where damaged."""
        known = header.get("units")
        if known is None:
            return None
        try:
            return cls(*(tuple(map(kind, known[name])) for name, kind in _PARTS.items()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} has no units of fields ({error!r}); accepted: weights as written") from None


_PARTS = {"offset": float, "scale": float, "names": str}
