"""Exponential moving averages of modules."""

import copy

import torch
from torch import nn


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

    @torch.no_grad()
    def update(self, modules: dict[str, nn.Module]) -> None:
        """Move every average towards its module."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for name, average in self.modules.items():
            averages, currents = list(average.parameters()), list(modules[name].parameters())
            torch._foreach_lerp_(averages, currents, 1.0 - decay)
            for target, source in zip(average.buffers(), modules[name].buffers()):
                target.copy_(source)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "modules": {n: m.state_dict() for n, m in self.modules.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
