"""Completions of fields known in part, as training reads them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from data.fields import FieldSet
from diffusion.completion import Moments, completed, measure_moments
from diffusion.random import Purpose, stream

log = logging.getLogger(__name__)


class CompletedFields:
    """A set of completed fields (C, H, W), or of pairs (2C, H, W): values, NaN where not known, then these."""

    pixels = None

    def __init__(self, fields: FieldSet, moments: Moments, seed: int, number: int, pairs: bool) -> None:
        self.groups = fields.groups
        self._items: list[torch.Tensor] = []
        for group in fields.groups:
            some = torch.stack([fields[i] for i in group])
            generator = stream(seed, Purpose.COMPLETION, number, group[0])
            whole = completed(some, moments, generator).float() if some.isnan().any() else some
            self._items += torch.cat([some, whole], 1) if pairs else whole  # items of one size follow each other

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self._items[i]


def completed_sets(sets: Sequence[FieldSet], seed: int, pairs: bool) -> list[CompletedFields]:
    """Sets of fields completed with the second moments of the first of them; pairs: see `CompletedFields`."""
    first = sets[0]
    chosen = next((group for group in first.groups if first[group[0]].shape[1:] == first.size), first.groups[0])
    log.info("completing %d fields that are known in part", sum(map(len, sets)))
    moments = measure_moments(torch.stack([first[i] for i in chosen]), stream(seed, Purpose.COMPLETION))
    return [CompletedFields(fields, moments, seed, number, pairs) for number, fields in enumerate(sets)]
