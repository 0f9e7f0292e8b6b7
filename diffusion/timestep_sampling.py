"""How the diffusion step of each training example is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Seen = tuple[list[int], list[float]]  # steps, and the loss at each


class UniformTimesteps:
    """Every step equally often; all weights are 1."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def sample(
        self, generator: torch.Generator, batch: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps t int64 (B,) and weights float32 (B,) that keep a weighted loss unbiased; generator: on `device`."""
        t = torch.randint(self.num_steps, (batch,), generator=generator, device=device)
        return t, torch.ones(batch, device=device)

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Take note of per-sample losses (B,) at steps t (B,); nothing to learn here."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            raise ValueError(f"state of the timestep sampler holds {sorted(state)}; the uniform one has none")


class LossAwareTimesteps:
    """Steps drawn with p_t ∝ √E[L_t²] over their recent losses, which gives the loss the least variance.

    Uniform until every step has been seen `history` times, and with probability `uniform_probability` afterwards, so
    that no step is forgotten. The state lives on the CPU. Source: Nichol & Dhariwal 2021, section 3.3.

    gather: given the steps and losses of this process, returns those of all, in the same order everywhere; the state
    then is the same in all.
    """

    def __init__(
        self,
        num_steps: int,
        history: int = 10,
        uniform_probability: float = 0.001,
        gather: Callable[[Seen], list[Seen]] = lambda own: [own],
    ) -> None:
        if num_steps < 1 or history < 1 or not 0 < uniform_probability <= 1:
            raise ValueError(
                f"loss-aware steps: num_steps {num_steps} and history {history} must be at least 1, "
                f"uniform_probability {uniform_probability} in (0, 1]"
            )
        self.num_steps = num_steps
        self.uniform_probability = uniform_probability
        self._gather = gather
        self._losses = torch.zeros(num_steps, history, dtype=torch.float64)
        self._counts = torch.zeros(num_steps, dtype=torch.int64)

    def probabilities(self) -> torch.Tensor:
        """The probability of each step, float64 (T,) on the CPU."""
        uniform = torch.full((self.num_steps,), 1 / self.num_steps, dtype=torch.float64)
        if bool((self._counts < self._losses.shape[1]).any()):
            return uniform
        wanted = self._losses.square().mean(dim=1).sqrt()
        total = wanted.sum()
        if total == 0:
            return uniform
        return (1 - self.uniform_probability) * wanted / total + self.uniform_probability * uniform

    def sample(
        self, generator: torch.Generator, batch: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps t int64 (B,) and weights 1/(T·p_t) float32 (B,); arguments as for `UniformTimesteps`."""
        probabilities = self.probabilities().to(device)
        t = torch.multinomial(probabilities, batch, replacement=True, generator=generator)
        return t, (1 / (self.num_steps * probabilities[t])).float()

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Record unweighted losses (B,) at steps t (B,), of all processes; waits for the device."""
        length = self._losses.shape[1]
        for steps, values in self._gather((t.tolist(), losses.detach().double().tolist())):
            for step, loss in zip(steps, values, strict=True):
                if not math.isfinite(loss):
                    continue  # one overflow must not decide the probabilities
                self._losses[step, self._counts[step] % length] = loss
                self._counts[step] += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The recent losses float64 (T, history) and how many each step has seen, int64 (T,)."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a `state_dict`; raises ValueError if it has another number of steps or history."""
        for name, own in (("losses", self._losses), ("counts", self._counts)):
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"state of the timestep sampler: {name} is {found}; this one has {tuple(own.shape)}")
        self._losses = state["losses"].to("cpu", torch.float64, copy=True)
        self._counts = state["counts"].to("cpu", torch.int64, copy=True)
