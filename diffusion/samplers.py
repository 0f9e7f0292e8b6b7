"""Samplers: pure functions of a denoiser, a state, a process and a source of noise.

They know no network and no resolution. All have one signature, `SamplerFunction`, and stand in `SAMPLERS`. In it,

    denoise   maps (x_t, t) to `Denoised`;
    x         is a state in any shape (B, ...), always mollified: Tξ, or for inversion T x_0;
    noise     returns mollified noise Tξ shaped like x, fresh at each call;
    start     is the step whose state x is, by default the last;
    correct   is given (x, t, denoised) after step t and returns the x to go on with, see `diffusion.conditioning`;
    callback  is given (i, t, x, denoised) when the i-th step is done.

Gradients are followed unless the caller disables them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from diffusion.process import Denoised, Denoiser, DiffusionProcess

Noise = Callable[[], torch.Tensor]
Callback = Callable[[int, int, torch.Tensor, Denoised], None]
Correction = Callable[[torch.Tensor, int, Denoised], torch.Tensor]


class SamplerFunction(Protocol):
    """Draws T x_0, shaped like `x`; its arguments are described at the top of this module."""

    def __call__(
        self,
        denoise: Denoiser,
        x: torch.Tensor,
        process: DiffusionProcess,
        *,
        noise: Noise | None = None,
        start: int | None = None,
        correct: Correction | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor: ...


class LastEstimate:
    """A callback that keeps the estimates of the last step as `denoised`, and hands every step on to another one.

    `denoised` is None until a sampler calls it, which one written by hand may never do.
    """

    def __init__(self, callback: Callback | None = None) -> None:
        self._callback = callback
        self.denoised: Denoised | None = None

    def __call__(self, i: int, t: int, x: torch.Tensor, denoised: Denoised) -> None:
        self.denoised = denoised
        if self._callback is not None:
            self._callback(i, t, x, denoised)


def _run(
    advance: Callable[[Denoised, torch.Tensor, torch.Tensor, int], torch.Tensor],
    denoise: Denoiser,
    x: torch.Tensor,
    process: DiffusionProcess,
    start: int | None,
    correct: Correction | None,
    callback: Callback | None,
) -> torch.Tensor:
    """The loop of every sampler, from step `start`, by default the last, down to 0.

    advance: makes x_{t-1} of (denoised, x_t, t, the step as a number).
    """
    for i, step in enumerate(range(_level(process, start, "start"), -1, -1)):
        t = _batch_of(step, x)
        denoised = denoise(x, t)
        x = advance(denoised, x, t, step)
        if correct is not None:
            x = correct(x, step, denoised)
        if callback is not None:
            callback(i, step, x, denoised)
    return x


def ancestral_step(
    process: DiffusionProcess,
    denoised: Denoised,
    x: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """One reverse step from x_t to x_{t-1}, eq. (14) and (40): posterior mean plus σ_t ⊙ Tξ, no noise where t = 0.

    A learned σ_t varies over the image. It multiplies the mollified noise, which makes the covariance
    diag(σ_t) T Tᵗ diag(σ_t), or σ_t² T Tᵗ where σ_t is constant.
    noise: Tξ shaped like x; None stands for zero.
    """
    mean = process.posterior_mean(denoised.smooth, x, t)
    if noise is None:
        return mean
    sigma = torch.exp(0.5 * denoised.log_variance) * (t > 0).reshape(-1, *(1,) * (x.ndim - 1))
    return (mean + sigma * noise).to(x.dtype)


def ancestral(
    denoise: Denoiser,
    x: torch.Tensor,
    process: DiffusionProcess,
    *,
    noise: Noise | None = None,
    start: int | None = None,
    correct: Correction | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Draw T x_0 by the reverse chain of the process, Ho et al. 2020 in mollified space, section 3.2. Needs `noise`.

    x: the state at step `start`, by default the last, where it is Tξ.
    """
    if noise is None:
        raise ValueError("noise is None; accepted: a source of mollified noise, which the reverse chain adds")

    def step(denoised: Denoised, x: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
        return ancestral_step(process, denoised, x, t, noise() if i > 0 else None)

    return _run(step, denoise, x, process, start, correct, callback)


def ddim_step(
    process: DiffusionProcess,
    denoised: Denoised,
    x: torch.Tensor,
    t: torch.Tensor,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """One DDIM step, Song et al. 2021, eq. (12) and (16):

        x_{t-1} = √ᾱ_{t-1} · smooth + √(1 - ᾱ_{t-1} - s²) · noise + s · Tξ,    s² = η² (1 - ᾱ_{t-1}) / (1 - ᾱ_t) · β_t.

    noise: Tξ shaped like x, for η > 0; None stands for zero.
    """
    at = process.schedule.at
    alpha_bar, alpha_bar_prev = at("alpha_bar", t, x), at("alpha_bar_prev", t, x)
    variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    # 1 - ᾱ - s² is zero for η = 1 at the last step, and may round below it.
    direction = (1 - alpha_bar_prev - variance).clamp(min=0).sqrt()
    following = alpha_bar_prev.sqrt() * denoised.smooth + direction * denoised.noise
    if noise is not None:
        following = following + variance.sqrt() * noise
    return following.to(x.dtype)


def ddim(
    denoise: Denoiser,
    x: torch.Tensor,
    process: DiffusionProcess,
    *,
    noise: Noise | None = None,
    start: int | None = None,
    correct: Correction | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    """Draw T x_0 by DDIM, deterministic for eta = 0.

    x: the state at step `start` (default: the last, where it is Tξ), for example the result of `ddim_invert`.
    eta: 0 … 1, where 1 has the variance β̃_t of the reverse chain; above 0 it needs `noise`.
    """
    _check_eta(eta)
    if eta > 0 and noise is None:
        raise ValueError(f"noise is None; accepted with eta {eta}: a source of mollified noise")

    def step(denoised: Denoised, x: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
        return ddim_step(process, denoised, x, t, eta, noise() if noise and eta > 0 and i > 0 else None)

    return _run(step, denoise, x, process, start, correct, callback)


def dpmpp_step(
    process: DiffusionProcess, denoised: Denoised, before: Denoised | None, x: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """One step t ≥ 1 of DPM-Solver++ (2M), Lu et al. 2022, algorithm 2, with λ = log √ᾱ/√(1 - ᾱ), h = λ_{t-1} - λ_t:

        x_{t-1} = √(1 - ᾱ_{t-1}) / √(1 - ᾱ_t) · x_t + √ᾱ_{t-1} (1 - e^{-h}) · (y + h / (2 h') · (y - y')).

    y is `denoised.smooth`, y' the same at step t + 1, and h' the length of the step from there. Without y' this is a
    step of DDIM. The solver integrates the linear part of the ODE exactly and the estimate to second order. The
    mollifier changes neither: T acts on x_t, y and y' alike.
    before: the estimates of step t + 1, or None.
    """
    at = process.schedule.at
    h = 0.5 * (at("log_snr", t - 1, x) - at("log_snr", t, x))
    y = denoised.smooth
    if before is not None:
        h_before = 0.5 * (at("log_snr", t, x) - at("log_snr", t + 1, x))
        y = y + h / (2 * h_before) * (y - before.smooth)
    noise = at("sqrt_one_minus_alpha_bar", t - 1, x) / at("sqrt_one_minus_alpha_bar", t, x)
    return (noise * x - at("sqrt_alpha_bar", t - 1, x) * torch.expm1(-h) * y).to(x.dtype)


def dpmpp(
    denoise: Denoiser,
    x: torch.Tensor,
    process: DiffusionProcess,
    *,
    noise: Noise | None = None,
    start: int | None = None,
    correct: Correction | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Draw T x_0 by DPM-Solver++ (2M): the deterministic map of DDIM in the limit, of second order in the steps.

    It wants steps evenly spaced in log-SNR, "logsnr20"; spaced evenly in t, the last ones are too long for it. The
    first step and the last, to ᾱ = 1 where log-SNR is infinite, are of first order.
    x, start: as in `ddim`. noise: not used.
    """
    before: Denoised | None = None

    def step(denoised: Denoised, x: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
        nonlocal before
        previous, before = before, denoised
        return dpmpp_step(process, denoised, previous, x, t) if i > 0 else denoised.smooth

    return _run(step, denoise, x, process, start, correct, callback)


@dataclass(frozen=True)
class Sampler:
    """An entry of `SAMPLERS`.

    draw: the function. steps: its step subset where none is asked for. spacing: what comes before a mere number of
    steps, see `Schedule.respace`. always_noisy: whether it draws noise whatever eta is. takes_eta: whether it has a
    keyword `eta`. delta: where its denoiser is evaluated on a lattice that grows, δ of `diffusion.progressive`.
    """

    draw: SamplerFunction
    steps: str
    spacing: str = ""
    always_noisy: bool = False
    takes_eta: bool = False
    delta: float | None = None

    @property
    def grows(self) -> bool:
        """Whether its denoiser is evaluated on a lattice that grows; it then needs the spectrum of the data."""
        return self.delta is not None

    def step_spec(self, steps: str | int | None) -> str:
        """The step subset that `steps` stands for, None being the default."""
        spec = self.steps if steps is None else str(steps)
        return self.spacing + spec if spec.isdecimal() else spec

    def draws_noise(self, eta: float) -> bool:
        """Whether its steps draw noise, at this eta."""
        return self.always_noisy or eta > 0

    def with_eta(self, eta: float) -> SamplerFunction:
        """The function with eta bound; raises ValueError unless the sampler accepts it."""
        _check_eta(eta)
        if self.takes_eta:
            draw: Callable[..., torch.Tensor] = self.draw
            return partial(draw, eta=eta)
        if eta > 0:
            others = [name for name, sampler in SAMPLERS.items() if sampler.takes_eta]
            raise ValueError(f"eta is {eta}; accepted: 0, since only {', '.join(others)} can vary it")
        return self.draw


# All samplers, by the names of configurations and commands. A new one needs a line here and nothing elsewhere.
SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim, steps="100", takes_eta=True),
    "ddpm": Sampler(ancestral, steps="100", always_noisy=True),
    "dpmpp": Sampler(dpmpp, steps="20", spacing="logsnr"),
    "progressive": Sampler(ddim, steps="100", takes_eta=True, delta=0.05),
    "progressive_dpmpp": Sampler(dpmpp, steps="20", spacing="logsnr", delta=0.05),
}


def ddim_invert_step(process: DiffusionProcess, denoised: Denoised, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """One DDIM step towards noise, x_{t+1} = √ᾱ_{t+1} · smooth + √(1 - ᾱ_{t+1}) · noise."""
    alpha_bar_next = process.schedule.at("alpha_bar_next", t, x)
    return (alpha_bar_next.sqrt() * denoised.smooth + (1 - alpha_bar_next).sqrt() * denoised.noise).to(x.dtype)


def ddim_invert(
    denoise: Denoiser,
    x: torch.Tensor,
    process: DiffusionProcess,
    *,
    stop: int | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Encode T x_0 to the state at step `stop`, by default the last, from which `ddim(start=stop)` leads back to it.

    The steps ascend, each from the state the one before has reached; the clean image stands in for the state at step 0.
    """
    for i in range(_level(process, stop, "stop")):
        t = _batch_of(i, x)
        denoised = denoise(x, t)
        x = ddim_invert_step(process, denoised, x, t)
        if callback is not None:
            callback(i, i, x, denoised)
    return x


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; accepted: 0 to 1")


def _level(process: DiffusionProcess, step: int | None, name: str) -> int:
    last = process.schedule.num_steps - 1
    if step is None:
        return last
    if not 0 <= step <= last:
        raise ValueError(f"{name} is {step}; accepted: 0 to {last}, the steps of the process")
    return step


def _batch_of(step: int, x: torch.Tensor) -> torch.Tensor:
    """A step as the int64 (B,) that denoisers take."""
    return torch.full((x.shape[0],), step, dtype=torch.int64, device=x.device)
