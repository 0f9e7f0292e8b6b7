"""How the diffusion step of each training example is drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Gather = Callable[[torch.Tensor], torch.Tensor]


class TimestepSampler(Protocol):
    """Draws steps for training, and may learn from their losses."""

    def sample(
        self, generator: torch.Generator, batch: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps t int64 (B,) and weights float32 (B,) that keep a weighted loss unbiased; generator: on `device`."""

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Take note of unweighted losses (B,) at steps t (B,)."""

    def state_dict(self) -> dict[str, torch.Tensor]: ...

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


class UniformTimesteps:
    """Every step equally often; all weights are 1. Nothing is learnt, so there is nothing to keep or to gather."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def sample(
        self, generator: torch.Generator, batch: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.randint(self.num_steps, (batch,), generator=generator, device=device)
        return t, torch.ones(batch, device=device)

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        pass

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            raise ValueError(
                f"state of the timestep sampler holds {sorted(state)}; accepted by one that learns nothing: none"
            )


class LogNormalTimesteps(UniformTimesteps):
    """Steps whose log SNR is distributed as N(mean, deviation²), and with probability `uniform` any step.

    All weights are 1: the loss counts steps as often as they are drawn. Mean and deviation are those of Karras et al.
    2022, table 1, where ln σ is distributed as N(-1.2, 1.2²), and SNR = 1/σ².

    log_snr: log ᾱ_t/(1 - ᾱ_t) of the steps, falling, (T,), T >= 2, on the device of the draws.
    """

    def __init__(self, log_snr: torch.Tensor, mean: float = 2.4, deviation: float = 2.4, uniform: float = 0.1) -> None:
        super().__init__(len(log_snr))
        (width,) = torch.gradient(log_snr.double())  # a step stands for what lies between its neighbours
        wanted = width.abs() * torch.exp(-0.5 * ((log_snr.double() - mean) / deviation).square())
        self._probabilities = (1 - uniform) * wanted / wanted.sum() + uniform / len(log_snr)

    def probabilities(self) -> torch.Tensor:
        """The probability of each step, float64 (T,)."""
        return self._probabilities

    def sample(
        self, generator: torch.Generator, batch: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _drawn(self._probabilities, generator, batch, device), torch.ones(batch, device=device)


class LossAwareTimesteps:
    """Steps drawn with p_t ∝ √E[L_t²] over their recent losses, which gives the loss the least variance.

    Uniform until every step has been seen `history` times, and with probability `uniform_probability` afterwards, so
    that no step is forgotten. The state lives on `device`, and nothing is read back from there. Source: Nichol &
    Dhariwal 2021, section 3.3.

    gather: given a tensor of this process, returns those of all, stacked in the same order everywhere; the state then
    is the same in all.
    """

    def __init__(
        self,
        num_steps: int,
        device: torch.device | str = "cpu",
        gather: Gather = lambda own: own.unsqueeze(0),
        history: int = 10,
        uniform_probability: float = 0.001,
    ) -> None:
        if num_steps < 1 or history < 1 or not 0 < uniform_probability <= 1:
            raise ValueError(
                f"num_steps, history, uniform_probability are {num_steps}, {history}, {uniform_probability}; "
                "accepted: at least 1, at least 1, in (0, 1]"
            )
        self.num_steps = num_steps
        self.uniform_probability = uniform_probability
        self._gather = gather
        self._losses = torch.zeros(num_steps, history, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_steps, dtype=torch.int64, device=device)

    def probabilities(self) -> torch.Tensor:
        """The probability of each step, float64 (T,) on the device of the state."""
        wanted = self._losses.square().mean(dim=1).sqrt()
        total, uniform = wanted.sum(), 1 / self.num_steps
        aware = (1 - self.uniform_probability) * wanted / total + self.uniform_probability * uniform
        known = (self._counts >= self._losses.shape[1]).all() & (total > 0)
        return torch.where(known, aware, uniform)

    def sample(
        self, generator: torch.Generator, batch: int, device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps t int64 (B,) and weights 1/(T·p_t) float32 (B,); arguments as for `UniformTimesteps`."""
        probabilities = self.probabilities()
        t = _drawn(probabilities, generator, batch, device)
        return t, (1 / (self.num_steps * probabilities[t])).float()

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Record unweighted losses (B,) at steps t (B,), of all processes, one after the other.

        One that is not finite is passed over: an overflow must not decide the probabilities.
        """
        everyones = self._gather(torch.stack([t.double(), losses.detach().double()]))  # (processes, 2, B)
        steps, values = everyones.transpose(0, 1).flatten(1)
        steps, finite, length = steps.long(), values.isfinite(), self._losses.shape[1]
        same = (steps[:, None] == steps) & finite  # of each, which others are recorded at its step
        place = (self._counts[steps] + same.tril(-1).sum(1)) % length
        stays = finite & (same.triu(1).sum(1) < length)  # what this update itself would push out is not written
        beyond = self._losses.numel()  # where the rest goes
        written = torch.where(stays, steps * length + place, beyond)
        held = torch.cat([self._losses.flatten(), values.new_zeros(1)]).scatter(0, written, values)
        self._losses = held[:beyond].view_as(self._losses)
        self._counts = self._counts.scatter_add(0, steps, finite.long())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The recent losses float64 (T, history) and how many each step has seen, int64 (T,)."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from a `state_dict`; raises ValueError if it has another number of steps or history."""
        for name, own in (("losses", self._losses), ("counts", self._counts)):
            if name not in state or state[name].shape != own.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"{name} of the timestep sampler is {found}; accepted: of shape {tuple(own.shape)}")
        device = self._losses.device
        self._losses = state["losses"].to(device, torch.float64, copy=True)
        self._counts = state["counts"].to(device, torch.int64, copy=True)


def _drawn(
    probabilities: torch.Tensor, generator: torch.Generator, batch: int, device: torch.device | str
) -> torch.Tensor:
    """Steps int64 (B,), by their distribution function: `torch.multinomial` reads its argument back for one of them."""
    ends = probabilities.cumsum(0)
    places = torch.rand(batch, generator=generator, dtype=torch.float64, device=device) * ends[-1]
    return torch.searchsorted(ends, places, right=True).clamp(max=len(ends) - 1)


# From log SNR of the steps, on the device of the draws, and what gathers a tensor of all processes.
TIMESTEP_SAMPLERS: dict[str, Callable[[torch.Tensor, Gather], TimestepSampler]] = {
    "uniform": lambda log_snr, gather: UniformTimesteps(len(log_snr)),
    "loss-second-moment": lambda log_snr, gather: LossAwareTimesteps(len(log_snr), log_snr.device, gather),
    "log-normal": lambda log_snr, gather: LogNormalTimesteps(log_snr),
}
