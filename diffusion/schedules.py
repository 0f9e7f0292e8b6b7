"""Noise schedules in float64, their tables, and subsets of their steps.

Index 0 is the least noisy step. alpha_bar_t is the product of 1 - beta up to and including step t.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from diffusion.transfer import to_device

MAX_BETA = 0.999
LEAST_SIGNAL = 1 / 127.5  # amplitude √ᾱ at which an image in [-1, 1] is one grey level of 8 bits
NETWORK_TIME_RANGE = 1000.0  # the network sees t·1000/T, so that models of different T share one time scale


def make_betas(name: str, steps: int, resolution: float | None = None) -> torch.Tensor:
    """Variances beta of the noise added per step, float64 (steps,).

    name: a name in `SCHEDULES`; or "const<beta>", e.g. "const0.008", whose beta refers to 1000 steps.
    resolution: side of the image in pixels, needed by "shifted_cosine".
    Raises ValueError for any other name, for steps < 1 and for a variance outside (0, 1).
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; accepted: 1 or more")
    if name in SCHEDULES:
        betas = SCHEDULES[name](steps, resolution)
    elif constant := re.fullmatch(r"const(\d*\.?\d+)", name):
        betas = torch.full((steps,), float(constant[1]) * 1000 / steps, dtype=torch.float64)
    else:
        raise ValueError(f"schedule is {name!r}; accepted: {SCHEDULES_ACCEPTED}")
    if not (0 < betas.min() and betas.max() < 1):
        raise ValueError(f"schedule is {name!r} with {steps} steps; accepted: variances in (0, 1), or more steps")
    return betas


def _linear(steps: int, resolution: float | None) -> torch.Tensor:
    """From 0.1/T to 20/T, Ho et al. 2020."""
    return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)


def _cosine(steps: int, resolution: float | None) -> torch.Tensor:
    """Nichol & Dhariwal 2021."""
    return _betas_of(lambda u: math.cos(_cosine_angle(u)) ** 2, steps)


def _shifted_cosine(steps: int, resolution: float | None) -> torch.Tensor:
    """The cosine schedule with (64 / resolution)² times its signal-to-noise ratio, Hoogeboom et al. 2023."""
    if resolution is None:
        raise ValueError("resolution is None; accepted with shifted_cosine: the side of the image in pixels")
    shift = 2 * math.log(64 / resolution)

    def alpha_bar(u: float) -> float:
        log_snr = shift - math.log(math.tan(_cosine_angle(u)) ** 2)
        return 1 / (1 + math.exp(-log_snr))

    return _betas_of(alpha_bar, steps)


def _cosine_angle(u: float) -> float:
    return (u + 0.008) / 1.008 * math.pi / 2


def _betas_of(alpha_bar: Callable[[float], float], steps: int) -> torch.Tensor:
    """Betas of a continuous alpha_bar(u), u in [0, 1]; capped, since alpha_bar(1) may be 0."""
    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), MAX_BETA) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64)


# From the number of steps and the side of the image in pixels to betas; "const<beta>" comes beside them.
SCHEDULES: dict[str, Callable[[int, float | None], torch.Tensor]] = {
    "cosine": _cosine,
    "linear": _linear,
    "shifted_cosine": _shifted_cosine,
}
STEPS_ACCEPTED = "100, ddim50, 10,15,20 or logsnr20"  # of `Schedule.respace`
SCHEDULES_ACCEPTED = f"{', '.join(SCHEDULES)} or const<beta> with 0 < beta < 1, e.g. const0.008"


def space_timesteps(steps: int, spec: str) -> list[int]:
    """The steps of a `steps`-step process that a shorter one keeps, ascending.

    spec: "100", evenly spaced with both ends; "10,15,20", that many in each of three equal sections; or "ddim50", at
        a constant integer stride from step 0.
    Raises ValueError if the spec cannot be met. Source: Nichol & Dhariwal 2021.
    """
    if spec.startswith("ddim"):
        count = _positive_int(spec.removeprefix("ddim"), spec)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ValueError(
            f"sampling steps are {spec!r}; accepted after ddim: what an integer stride takes of {steps} steps"
        )
    counts = [_positive_int(count, spec) for count in spec.split(",")]
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            where = f" in section {section}" if len(counts) > 1 else ""
            raise ValueError(f"sampling steps are {spec!r}; accepted{where}: at most {size} of {steps} steps")
        spacing = 1.0 if count == 1 else (size - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += spacing
        start += size
    return kept


def log_snr_timesteps(alpha_bar: torch.Tensor, spec: str) -> list[int]:
    """The steps that "logsnr20" keeps, ascending: 20 evenly spaced in log ᾱ/(1 - ᾱ), each the nearest that is left.

    They begin at step 0. The last is the noisiest whose signal √ᾱ is still a grey level, since steps beyond it, of
    which the cosine schedule has some that are far apart in log-SNR, do not show in the image.
    alpha_bar: float64 (T,). Raises ValueError if there are fewer steps than that.
    """
    count = _positive_int(spec.removeprefix("logsnr"), spec)
    seen = max(int((alpha_bar >= LEAST_SIGNAL**2).sum()), 1)
    if count > seen:
        raise ValueError(
            f"sampling steps are {spec!r}; accepted after logsnr: at most {seen}, the steps that show a signal"
        )
    log_snr = (alpha_bar.log() - (1 - alpha_bar).log())[:seen]
    kept: list[int] = []
    for position, target in enumerate(torch.linspace(log_snr[0], log_snr[-1], count, dtype=torch.float64)):
        nearest = int((log_snr - target).abs().argmin())
        free = kept[-1] + 1 if kept else 0
        kept.append(min(max(nearest, free), seen - count + position))
    return kept


_DIGITS = 9  # of a number of steps; Python refuses to convert thousands


def _positive_int(text: str, spec: str) -> int:
    if not text.strip().isdecimal() or len(text) > _DIGITS or int(text) < 1:
        raise ValueError(f"sampling steps are {spec!r}; accepted: numbers as in {STEPS_ACCEPTED}")
    return int(text)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The tables of a noise schedule, float64 (num_steps,) on the CPU; build it with `create` or `respace`.

    timestep_map: int64, for every step its index in the process the network was trained on.
    original_steps: number of steps of that process.
    log_snr: log ᾱ / (1 - ᾱ).
    posterior_*: of q(x_{t-1} | x_t, x_0), eq. (12): the variance; its logarithm, with the zero at t = 0 replaced by the
        entry after it; the factors of x_0 (coef1) and x_t (coef2) in the mean.
    fixed_large_log_variance: of beta, with the entry at t = 0 replaced by posterior_variance[1].
    """

    betas: torch.Tensor
    timestep_map: torch.Tensor
    original_steps: int
    alpha_bar: torch.Tensor = field(init=False)
    alpha_bar_prev: torch.Tensor = field(init=False)
    alpha_bar_next: torch.Tensor = field(init=False)
    sqrt_alpha_bar: torch.Tensor = field(init=False)
    sqrt_one_minus_alpha_bar: torch.Tensor = field(init=False)
    log_snr: torch.Tensor = field(init=False)
    sqrt_recipm1_alpha_bar: torch.Tensor = field(init=False)
    log_betas: torch.Tensor = field(init=False)
    posterior_variance: torch.Tensor = field(init=False)
    posterior_log_variance_clipped: torch.Tensor = field(init=False)
    posterior_mean_coef1: torch.Tensor = field(init=False)
    posterior_mean_coef2: torch.Tensor = field(init=False)
    fixed_large_log_variance: torch.Tensor = field(init=False)
    _device_tables: dict[tuple[str, torch.device], torch.Tensor] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        betas = self.betas
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        one, zero = betas.new_ones(1), betas.new_zeros(1)
        alpha_bar_prev = torch.cat([one, alpha_bar[:-1]])
        posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # The posterior variance at t = 0 is zero; where a logarithm is needed, the entry after it stands in.
        first_variance = posterior_variance[1:2] if len(betas) > 1 else betas
        tables = {
            "alpha_bar": alpha_bar,
            "alpha_bar_prev": alpha_bar_prev,
            "alpha_bar_next": torch.cat([alpha_bar[1:], zero]),
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "log_snr": alpha_bar.log() - (1 - alpha_bar).log(),
            "sqrt_recipm1_alpha_bar": (1 / alpha_bar - 1).sqrt(),
            "log_betas": betas.log(),
            "posterior_variance": posterior_variance,
            "posterior_log_variance_clipped": torch.cat([first_variance, posterior_variance[1:]]).log(),
            "posterior_mean_coef1": betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            "posterior_mean_coef2": (1 - alpha_bar_prev) * (1 - betas).sqrt() / (1 - alpha_bar),
            "fixed_large_log_variance": torch.cat([first_variance, betas[1:]]).log(),
        }
        for name, table in tables.items():
            object.__setattr__(self, name, table)

    @classmethod
    def create(cls, name: str, steps: int, resolution: float | None = None) -> Schedule:
        """The schedule called `name` with `steps` steps; the arguments are those of `make_betas`."""
        return cls.from_betas(make_betas(name, steps, resolution))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | torch.Tensor) -> Schedule:
        """The schedule whose step t adds noise of variance betas[t], each in (0, 1), else ValueError."""
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas are {betas.tolist()}; accepted: one number in (0, 1) for each step")
        return cls(betas, torch.arange(len(betas)), len(betas))

    @property
    def num_steps(self) -> int:
        """Number of steps T of this, possibly respaced, schedule."""
        return len(self.betas)

    def respace(self, kept: str | Iterable[int]) -> Schedule:
        """The schedule that visits only some steps, with the same alpha_bar at them.

        kept: a spec of `space_timesteps` or `log_snr_timesteps`, or the indices of the steps, in any order.
        """
        if not isinstance(kept, str):
            indices = sorted(set(kept))
        elif kept.startswith("logsnr"):
            indices = log_snr_timesteps(self.alpha_bar, kept)
        else:
            indices = space_timesteps(self.num_steps, kept)
        if not indices or indices[0] < 0 or indices[-1] >= self.num_steps:
            raise ValueError(f"kept steps are {indices}; accepted: at least one, all from 0 to {self.num_steps - 1}")
        alpha_bar = self.alpha_bar[indices]
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return Schedule(1 - alpha_bar / previous, self.timestep_map[indices], self.original_steps)

    def step_until(self, t: int) -> int:
        """The noisiest step of this schedule that is no noisier than step t of the original process; at least 0."""
        return max(int((self.timestep_map <= t).sum()) - 1, 0)

    def at(self, table: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Entries t of a table, shaped to multiply `like`.

        table: the name of one of the attributes above. t: int64 (B,), 0 … T-1. like: (B, ...).
        Returns (B, 1, ...), rounded from float64 at the very end, to the dtype of `like` but at least float32.
        """
        values = self._on_device(table, t.device)[t].to(torch.promote_types(like.dtype, torch.float32))
        return values.reshape(-1, *(1,) * (like.ndim - 1))

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """The time that a network receives at steps t, float32 (B,): the original index · 1000 / original_steps."""
        return self._on_device("timestep_map", t.device)[t].float() * (NETWORK_TIME_RANGE / self.original_steps)

    def _on_device(self, table: str, device: torch.device) -> torch.Tensor:
        """The table on a device, copied there once: a look-up must not make a GPU wait for the host."""
        key = (table, device)
        if key not in self._device_tables:
            self._device_tables[key] = to_device(getattr(self, table), device)
        return self._device_tables[key]
