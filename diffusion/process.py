"""The mollified diffusion process: its forward law, its posterior, and what a network's output says about a state.

T is the mollifier, ξ white noise, x_t a state. States are mollified,

    x_t = √ᾱ_t · T x_0 + √(1 - ᾱ_t) · T ξ,        (11)

and so are the estimates made of them. In names, x_0 and `white` are the data and ξ themselves; `smooth` and `noise`
are T x_0 and T ξ. With the identity as T (sigma 0) this is ordinary diffusion, of images (B, C, H, W) or of vectors
(B, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch

from diffusion.coordinates import size_of
from diffusion.mollifier import Mollifier
from diffusion.schedules import Schedule


class Prediction(Enum):
    """What the network predicts; the values are the names used in configs."""

    MOLLIFIED_EPS = "mollified_epsilon"  # T ξ, eq. (46)
    X0 = "xstart"  # x_0, eq. (36) and (39)
    EPS = "epsilon"  # ξ
    V = "v"  # √ᾱ ξ - √(1 - ᾱ) x_0, Salimans & Ho 2022


PREDICTIONS = tuple(prediction.value for prediction in Prediction)
FINAL_ESTIMATES = ("auto", "network", "filter")  # what images are in the end: the network's x_0 where it predicts it


class Variance(Enum):
    """The variance σ_t² of the reverse step, whose covariance is σ_t² T Tᵗ."""

    FIXED_LARGE = "fixed_large"  # β_t
    FIXED_SMALL = "fixed_small"  # β̃_t, eq. (12)
    LEARNED = "learned"  # the second half of the network's channels is log σ_t²
    LEARNED_RANGE = "learned_range"  # … is a position from log β̃_t at -1 to log β_t at 1, Nichol & Dhariwal 2021

    @property
    def learned(self) -> bool:
        return self in (Variance.LEARNED, Variance.LEARNED_RANGE)


_FIXED_LOG_VARIANCES = {
    Variance.FIXED_LARGE: "fixed_large_log_variance",
    Variance.FIXED_SMALL: "posterior_log_variance_clipped",
}


@dataclass(frozen=True)
class Denoised:
    """What a denoiser makes of a state: x_t = √ᾱ_t · smooth + √(1 - ᾱ_t) · noise holds exactly.

    smooth, noise: the mollified estimates T x̂_0 and T ξ̂, shaped like x_t.
    log_variance: log σ_t² of the reverse step, (B, 1, ...) or, learned, shaped like x_t.
    sharp: x̂_0 itself where the network predicts it, and else None: to find it from T x̂_0 takes a Wiener filter.
    """

    smooth: torch.Tensor
    noise: torch.Tensor
    log_variance: torch.Tensor
    sharp: torch.Tensor | None = None


Denoiser = Callable[[torch.Tensor, torch.Tensor], Denoised]  # (x_t, t int64 (B,)) -> Denoised


@dataclass(frozen=True)
class DiffusionProcess:
    """A schedule, a mollifier, and the meaning of the network's output. Steps t are int64 (B,), 0 the cleanest.

    keep_sharp: give a predicted x_0 as `Denoised.sharp` too.
    """

    schedule: Schedule
    mollifier: Mollifier
    prediction: Prediction
    variance: Variance = Variance.FIXED_LARGE
    keep_sharp: bool = True

    @property
    def gives_sharp(self) -> bool:
        """Whether estimates have a `Denoised.sharp`."""
        return self.keep_sharp and self.prediction is Prediction.X0

    def respaced(self, kept: str | Iterable[int]) -> DiffusionProcess:
        """The same process on a subset of its steps, see `Schedule.respace`."""
        return replace(self, schedule=self.schedule.respace(kept))

    def _amplitudes(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), shaped to multiply `like`."""
        at = self.schedule.at
        return at("sqrt_alpha_bar", t, like), at("sqrt_one_minus_alpha_bar", t, like)

    def q_sample(self, x_0: torch.Tensor, t: torch.Tensor, white: torch.Tensor) -> torch.Tensor:
        """Draw x_t from q(x_t | x_0), eq. (11).

        x_0: un-mollified data (B, C, H, W) at any resolution, or (B, D). white: standard normal, same shape.
        """
        a, b = self._amplitudes(t, x_0)
        scale = self.mollifier.noise_scale(size_of(white))
        return self.mollifier(a * x_0 + b * scale * white).to(x_0.dtype)

    def training_pair(
        self, x_0: torch.Tensor, t: torch.Tensor, white: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The state x_t and what the network has to predict from it, shaped like x_0; arguments as in `q_sample`.

        The loss over Monte-Carlo points gathers both, eq. (10): the mollifier needs all pixels.
        """
        a, b = self._amplitudes(t, x_0)
        if self.prediction is Prediction.MOLLIFIED_EPS:
            noise = self.mollifier.noise(white)
            return (a * self.mollifier(x_0) + b * noise).to(x_0.dtype), noise
        x_t = self.q_sample(x_0, t, white)
        if self.prediction is Prediction.X0:
            return x_t, x_0
        white = white * self.mollifier.noise_scale(size_of(white))
        if self.prediction is Prediction.EPS:
            return x_t, white
        return x_t, (a * white - b * x_0).to(x_0.dtype)

    def denoise(self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, clip: bool) -> Denoised:
        """Turn the network's output into the estimates that samplers use.

        A predicted x_0, ξ or v is mollified first: the state consists of T x_0 and T ξ, not of x_0 and ξ. With `clip`,
        a predicted x_0 is clamped to [-1, 1] before it is mollified, an estimate of T x_0 as it is; the noise then
        follows from x_t and the clamped estimate.
        output: (B, C, H, W), with a learned variance (B, 2C, H, W); or vectors.
        """
        prediction, raw_variance = self.split(output, axis=1)
        a, b = self._amplitudes(t, x_t)
        sharp = None
        if self.prediction is Prediction.X0:
            prediction = prediction.clamp(-1, 1) if clip else prediction
            smooth = self.mollifier(prediction)
            sharp = prediction.to(x_t.dtype) if self.keep_sharp else None
        else:
            if self.prediction is Prediction.V:
                smooth = a * x_t - b * self.mollifier(prediction)
            else:
                mollified = self.prediction is Prediction.MOLLIFIED_EPS
                smooth = (x_t - b * (prediction if mollified else self.mollifier(prediction))) / a
            smooth = smooth.clamp(-1, 1) if clip else smooth
        noise = (x_t - a * smooth) / b
        return Denoised(smooth.to(x_t.dtype), noise.to(x_t.dtype), self.log_variance(raw_variance, t, x_t), sharp)

    def split(self, output: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Split a network's output into the prediction and the raw learned variance, None if variances are fixed.

        axis: that of the channels, 1 for (B, 2C, H, W) and (B, 2D), -1 for points (B, M, 2C).
        """
        if not self.variance.learned:
            return output, None
        if output.shape[axis] % 2:
            raise ValueError(
                f"output has {output.shape[axis]} channels; accepted with a learned variance: twice those of the data"
            )
        prediction, raw_variance = output.chunk(2, dim=axis)
        return prediction, raw_variance

    def log_variance(self, raw_variance: torch.Tensor | None, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """log σ_t² of the reverse step, at least float32; raw_variance: what `split` returns, shaped like `like`."""
        at = self.schedule.at
        if raw_variance is None:
            return at(_FIXED_LOG_VARIANCES[self.variance], t, like)
        raw_variance = raw_variance.to(torch.promote_types(raw_variance.dtype, torch.float32))
        if self.variance is Variance.LEARNED:
            return raw_variance
        low, high = at("posterior_log_variance_clipped", t, like), at("log_betas", t, like)
        return low + (raw_variance + 1) / 2 * (high - low)

    def posterior_mean(self, smooth: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), eq. (12), given T x_0."""
        at = self.schedule.at
        mean = at("posterior_mean_coef1", t, x_t) * smooth + at("posterior_mean_coef2", t, x_t) * x_t
        return mean.to(x_t.dtype)

    def denoiser(self, network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], clip: bool) -> Denoiser:
        """Wrap a network of (x_t, network time float32 (B,)) into the callable that samplers take."""

        def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Denoised:
            return self.denoise(network(x_t, self.schedule.network_time(t)), x_t, t, clip)

        return denoise
