"""What the training loop asks of a stage."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

Draws = dict[str, torch.Tensor]  # random numbers of a step, (B, ...) each
WHOLE = slice(None)


class Stage(Protocol):
    """What a training stage brings to the loop.

    examples: what it trains on, for people, e.g. {"images": 900, "held out": 100}. fingerprint: a digest of them.
    held_out: name of the loss on held-out data in the log. held_out_steps: steps between two of them, 0 for none.
    held_out_count: examples that it is of, 0 where nothing is held out. facts: what the header of weights says besides.
    """

    modules: dict[str, nn.Module]
    examples: dict[str, int]
    fingerprint: str
    held_out: str
    held_out_steps: int
    held_out_count: int
    facts: dict[str, Any]

    def batches(self, seen: int) -> Iterator[torch.Tensor]:
        """Yield this process's share of every batch after the first `seen` examples of all processes, without end."""

    def draw(
        self, generator: torch.Generator, batch: int, rows: slice = WHOLE, examples: torch.Tensor | None = None, /
    ) -> Draws:
        """Draw the random numbers of a step for a batch of so many examples, and return those of some of them.

        examples: these, where what is drawn depends on them.
        """

    def loss(self, batch: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean loss of examples, the unweighted loss of each (B,), and further means to log."""

    def learn(self, draws: Draws, losses: torch.Tensor) -> None:
        """Take note of the unweighted losses (B,) of this process's share of a step."""

    def previews(self, ema: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Return rows of previews (N, C, H, W) made with the EMA weights."""

    def held_out_loss(self, ema: dict[str, nn.Module]) -> float:
        """Return the mean loss of the EMA weights on held-out data, with the same random draws at every call."""

    def weights(self, ema: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Return the tensors of the inference file."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
