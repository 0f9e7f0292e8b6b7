"""Averages of the weights of modules over training: exponential (EMA), and power functions of time."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from training.power_averages import exponent, newest_weight

log = logging.getLogger(__name__)


class Ema:
    """Averages of several modules, started from copies of them.

    θ̄ ← d·θ̄ + (1 − d)·θ with d = min(decay, (1 + n)/(10 + n)) at update n, so that a short run is not
    dominated by its initial weights; buffers are copied. The averages are kept in evaluation mode.

    Args:
        modules: name -> module being trained.
        decay: largest d, in [0, 1].
    """

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.modules = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}
        # Collected once: walking the modules takes longer than the arithmetic.
        self._averages = [p for module in self.modules.values() for p in module.parameters()]
        self._current = [p for module in modules.values() for p in module.parameters()]
        self._buffers = [
            (b, modules[name].get_buffer(key))
            for name, module in self.modules.items()
            for key, b in module.named_buffers()
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its module."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._averages, self._current, 1.0 - decay)
        for average, current in self._buffers:
            average.copy_(current)

    def restart(self, modules: dict[str, nn.Module]) -> None:
        """Begin anew from the weights of the modules."""
        self.load_state_dict({"updates": 0, "modules": {n: m.state_dict() for n, m in modules.items()}})

    def state_dict(self) -> dict:
        return {"updates": self.updates, "modules": {n: m.state_dict() for n, m in self.modules.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])


class PowerAverages:
    """Power-function averages of the parameters of several modules, of which `training.power_averages` makes others.

    Time counts updates, and begins at `origin`, the step at which these lengths were first kept.

    Args:
        modules: name -> module being trained.
        lengths: σ_rel of each average; none, and nothing is kept.
    """

    def __init__(self, modules: dict[str, nn.Module], lengths: Sequence[float]) -> None:
        self.lengths, self.updates, self.origin = tuple(lengths), 0, 0
        self._exponents = [exponent(length) for length in lengths]
        self._current = {
            f"{name}.{key}": p.detach() for name, module in modules.items() for key, p in module.named_parameters()
        }
        self.values = [{name: p.clone() for name, p in self._current.items()} for _ in lengths]

    @torch.no_grad()
    def update(self) -> None:
        """Take the modules' parameters into every average."""
        self.updates += 1
        for gamma, average in zip(self._exponents, self.values):
            weight = newest_weight(gamma, self.updates)
            torch._foreach_lerp_(list(average.values()), list(self._current.values()), weight)

    def state_dict(self) -> dict[str, Any]:
        state = {"lengths": self.lengths, "updates": self.updates, "origin": self.origin}
        return {**state, "values": self.values} if self.lengths else {}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Go on from a state of the same lengths, else begin at `step`."""
        if tuple(state.get("lengths", ())) != self.lengths:
            self.updates, self.origin = 0, step
            if self.lengths:
                log.info("averages of lengths %s begin at step %d", ", ".join(map(str, self.lengths)), step)
        elif self.lengths:
            self.updates, self.origin = state["updates"], state["origin"]
            for average, stored in zip(self.values, state["values"]):
                for name, value in average.items():
                    value.copy_(stored[name])
