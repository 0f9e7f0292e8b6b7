"""Training losses. Each returns one number per sample, (B,): a mean over all other axes unless it says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool2d

from diffusion.process import DiffusionProcess, Prediction

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (prediction, target), each (B, ...), to (B,)
LossWeight = Callable[[DiffusionProcess, torch.Tensor, float, str], torch.Tensor]  # (process, t, γ, loss), to (B,)

COARSEST_LEVEL = 32
HALF_GREY_LEVEL = 1 / 255  # half the distance of two 8-bit values, in units of [-1, 1]


def per_sample_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean over all axes but the first: (B, ...) to (B,)."""
    return x.flatten(1).mean(dim=1)


def _difference(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """prediction - target, at least in float32: squares of half-precision numbers overflow."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32)) - target


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error per sample, eq. (46): (B,)."""
    return per_sample_mean(_difference(prediction, target).square())


def l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error per sample: (B,)."""
    return per_sample_mean(_difference(prediction, target).abs())


LOSSES: dict[str, Loss] = {"mse": mse, "l1": l1}


def uniform_weight(process: DiffusionProcess, t: torch.Tensor, gamma: float, loss_type: str = "mse") -> torch.Tensor:
    """Weights 1, float64 (B,); arguments as in `min_snr_weight`."""
    return torch.ones(t.shape, dtype=torch.float64, device=t.device)


def min_snr_weight(process: DiffusionProcess, t: torch.Tensor, gamma: float, loss_type: str = "mse") -> torch.Tensor:
    """Weights (B,), float64, of the losses at steps t, after Hang et al. 2023 (min-SNR-γ), with SNR = ᾱ / (1 - ᾱ):

        min(SNR, γ)  for a predicted x_0,   min(SNR, γ) / SNR  for ξ and Tξ,   min(SNR, γ) / (SNR + 1)  for v.

    Then an error in x_0 at a fixed state weighs min(SNR, γ), whatever the network predicts.
    gamma: γ > 0. loss_type: a name in `LOSSES`; "l1", a loss of first degree, takes the roots of these weights.
    """
    like = torch.empty(0, dtype=torch.float64, device=t.device)
    snr = process.schedule.at("log_snr", t, like).exp()
    weight = snr.clamp(max=gamma) * _x_0_per_target(process, t, like).square()
    return weight.sqrt() if loss_type == "l1" else weight


LOSS_WEIGHTS: dict[str, LossWeight] = {"none": uniform_weight, "min_snr": min_snr_weight}


def multiscale(
    loss: Loss,
    prediction: torch.Tensor,
    target: torch.Tensor,
    to_grid: Callable[[torch.Tensor], torch.Tensor],
    grid_size: int,
    image_size: int,
) -> torch.Tensor:
    """Sum of a loss at the points and on coarser versions of the function, each weighted by one over its side.

    L = loss / image_size + Σ_r loss(average-pooled to r × r) / r, for r = grid_size, grid_size/2, … ≥ 32 and
    r < image_size: low frequencies, of which an image has few, count as much as high ones.

    prediction, target: values in any layout (B, ...), at points or of all pixels.
    to_grid: interpolates such values to (B, C, grid_size, grid_size).
    image_size: side of the image in pixels. Source: Hoogeboom et al. 2023.
    """
    total = loss(prediction, target) / image_size
    coarse_prediction, coarse_target = to_grid(prediction), to_grid(target)
    side = grid_size
    while side >= COARSEST_LEVEL:
        if side < image_size:
            total = total + loss(coarse_prediction, coarse_target) / side
        if side % 2:
            break
        coarse_prediction, coarse_target = avg_pool2d(coarse_prediction, 2), avg_pool2d(coarse_target, 2)
        side //= 2
    return total


def kl_gaussians(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)) in nats, elementwise with broadcasting."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def kl_standard_normal(mu: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, variance) ‖ N(0, 1)) in nats, summed over the latent: mu, log_variance (B, D) to (B,)."""
    return -0.5 * (1 + log_variance - mu.square() - log_variance.exp()).flatten(1).sum(dim=1)


def log_probability_8bit(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of 8-bit data under a Gaussian, elementwise: its mass within half a grey level of x.

    x: in [-1, 1]; the outermost levels own the tails. The normal distribution function is Page's approximation.
    Source: Ho et al. 2020, eq. (13).
    """
    scale = torch.exp(-log_std)
    below_upper = _normal_cdf((x - mean + HALF_GREY_LEVEL) * scale)
    below_lower = _normal_cdf((x - mean - HALF_GREY_LEVEL) * scale)
    mass = below_upper - below_lower
    mass = torch.where(x > 0.999, 1 - below_lower, torch.where(x < -0.999, below_upper, mass))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(u: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def variational_bound(
    process: DiffusionProcess,
    prediction: torch.Tensor,
    log_variance: torch.Tensor,
    target: torch.Tensor,
    x_0: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """Term L_{t-1} of the variational bound in bits per value, for learned variances: (B,).

    For t > 0 it is KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)), at t = 0 the negative log-likelihood of 8-bit data.
    The covariances σ² T Tᵗ of both laws call for T⁻¹, eq. (34). For a predicted x_0, ξ or v it cancels against the T
    before the prediction, eq. (38); for a predicted Tξ it is dropped, as in (46). What is left is pointwise, with
    μ̃ - μ_θ a multiple of the network's own error: the bound holds at any points, and T is never applied.

    prediction, target, x_0 (un-mollified data): (B, M, C), (B, C, H, W) or (B, D).
    log_variance: that of the reverse step, from `DiffusionProcess.log_variance`.
    Detach the prediction to train the variance alone. Source: Nichol & Dhariwal 2021.
    """
    at = process.schedule.at
    x_0_error = _x_0_per_target(process, t, target) * _difference(prediction, target)  # x̂_0 - x_0
    mean_error = at("posterior_mean_coef1", t, target) * x_0_error
    posterior = at("posterior_log_variance_clipped", t, target)
    kl = kl_gaussians(torch.zeros_like(mean_error), posterior, mean_error, log_variance)
    nll = -log_probability_8bit(x_0, x_0 + mean_error, 0.5 * log_variance)
    return torch.where(t > 0, per_sample_mean(kl), per_sample_mean(nll)) / math.log(2)


@dataclass(frozen=True)
class Objective:
    """What training minimises: a loss of the prediction, weighted by step, and the bound for a learned variance.

    loss: a name in `LOSSES`. weight: a name in `LOSS_WEIGHTS`. gamma: its γ.
    """

    process: DiffusionProcess
    loss: str
    weight: str
    gamma: float

    def __call__(
        self,
        output: torch.Tensor,
        target: torch.Tensor,
        x_0: torch.Tensor,
        t: torch.Tensor,
        axis: int = 1,
        loss: Loss | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss and the bound of each sample, float32 (B,); the bound is zero where variances are fixed.

        output: of the network, with channels along `axis`. target, x_0: shaped like the prediction in it.
        loss: stands in for `LOSSES[self.loss]`, and is of the same degree.
        """
        prediction, raw_variance = self.process.split(output.float(), axis)
        weight = LOSS_WEIGHTS[self.weight](self.process, t, self.gamma, self.loss).float()
        base = weight * (loss or LOSSES[self.loss])(prediction, target)
        if raw_variance is None:
            return base, torch.zeros_like(base)
        log_variance = self.process.log_variance(raw_variance, t, target)
        return base, variational_bound(self.process, prediction.detach(), log_variance, target, x_0, t)


def _x_0_per_target(process: DiffusionProcess, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The change of x_0 per change of the predicted quantity, at fixed x_t."""
    at = process.schedule.at
    if process.prediction is Prediction.X0:
        return torch.ones_like(at("alpha_bar", t, like))
    if process.prediction is Prediction.V:
        return -at("sqrt_one_minus_alpha_bar", t, like)
    return -at("sqrt_recipm1_alpha_bar", t, like)
