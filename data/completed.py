"""Completions of fields known in part, as training reads them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from tqdm import tqdm

from data.fields import FieldSet
from diffusion.completion import Moments, completed, measure_moments
from diffusion.random import Purpose, stream

_AT_ONCE = 64  # fields, from one report of progress to the next
log = logging.getLogger(__name__)


class CompletedFields:
    """A set of completed fields (C, H, W), or of pairs (2C, H, W): values, NaN where not known, then these."""

    pixels = None

    def __init__(self, fields: FieldSet, moments: Moments, seed: int, number: int, pairs: bool) -> None:
        self.groups = fields.groups
        self._items: list[torch.Tensor] = []
        with tqdm(total=len(fields), desc="completing fields", disable=None, leave=False) as bar:
            for group in fields.groups:
                generator = stream(seed, Purpose.COMPLETION, number, group[0])
                for start in range(0, len(group), _AT_ONCE):
                    some = torch.stack([fields[i] for i in group[start : start + _AT_ONCE]])
                    whole = completed(some, moments, generator).float() if some.isnan().any() else some
                    self._items += torch.cat([some, whole], 1) if pairs else whole  # those of one size in turn
                    bar.update(len(some))

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
