"""Functions given measurements of them: the posterior of T x_0, or of x_0, under y = H f + η with η ~ N(0, R).

H is any linear map from images to measurements (`diffusion.sensors` has some), f is T x_0 or x_0, and R is diagonal.
Nothing here has a weight to tune.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusion.coordinates import size_of
from diffusion.process import Denoised, Denoiser, DiffusionProcess

Observe = Callable[[torch.Tensor], torch.Tensor]  # H: images (B, C, H, W) -> (B, M), linear and differentiable
MOST_ITERATIONS = 100
_TOLERANCE = 1e-3  # of residuals, relative to the right side


@dataclass(frozen=True)
class Measured:
    """Measurements `values`, (M,) or (B, M), of functions through `observe`, with variances R, (M,), 0 or more.

    process: that of the sampler.
    sharp: whether H looks at x_0, which the network must then predict, and not at T x_0.
    clip: keep corrected estimates in [-1, 1]. The denoiser must not: a clamped estimate has no gradient.
    iterations: at most so many vector-Jacobian products for each step.
    Raises ValueError for no measurement, values that are not finite, and variances that are not finite and ≥ 0.
    """

    observe: Observe
    values: torch.Tensor
    variance: torch.Tensor
    process: DiffusionProcess
    sharp: bool = False
    clip: bool = False
    iterations: int = MOST_ITERATIONS

    def __post_init__(self) -> None:
        check_measurements(self.values, self.variance)
        if self.sharp and not self.process.gives_sharp:
            raise ValueError("sharp is True; accepted: False, unless the network predicts x_0")

    def posterior(self, denoise: Denoiser) -> Denoiser:
        """A denoiser that takes the measurements into account: E[T x_0 | x_t, y] in place of x̂ = E[T x_0 | x_t],

            x̂ + V Hᵗ (H V Hᵗ + R)⁻¹ (y - H x̂),    V = Cov[T x_0 | x_t] = (s² b² / a) T Tᵗ Jᵗ,    J = ∂x̂ / ∂x_t,

        with a = √ᾱ_t, b = √(1 - ᾱ_t) and s the scale of noise at the resolution. V follows from Tweedie's formula: the
        noise of x_t has the covariance s² b² T Tᵗ, and J T Tᵗ = T Tᵗ Jᵗ. Of both forms this one needs vector-Jacobian
        products alone, one for each iteration of `conjugate_residuals`. What is assumed: p(x_0 | x_t) is Gaussian, and
        its mean is x̂, which also makes J T Tᵗ symmetric. Then the result is exact.

        x̂_0 is corrected by T⁻¹ of that, (s² b² / a) Tᵗ Jᵗ …, for which T need not be inverted. With `sharp`, J is
        ∂x̂_0 / ∂x_t, and H x̂_0 stands for H x̂.
        """

        def denoise_given(x_t: torch.Tensor, t: torch.Tensor) -> Denoised:
            mollifier, at = self.process.mollifier, self.process.schedule.at
            a, b = at("sqrt_alpha_bar", t, x_t), at("sqrt_one_minus_alpha_bar", t, x_t)
            scale = (mollifier.noise_scale(size_of(x_t)) * b) ** 2 / a
            with torch.enable_grad():
                x_t = x_t.detach().requires_grad_()
                denoised = denoise(x_t, t)
                found = denoised.sharp if self.sharp else denoised.smooth
                assert found is not None  # a process that gives x̂_0 always does
                seen = self.observe(found)

            def spread(weights: torch.Tensor) -> torch.Tensor:
                """The correction of x̂_0 that weights (B, M) of the measurements make."""
                (gradient,) = torch.autograd.grad(seen, x_t, weights.to(seen), retain_graph=True)
                return scale * mollifier(gradient)

            def covariance(weights: torch.Tensor) -> torch.Tensor:
                """(H V Hᵗ + R) w."""
                step = spread(weights)
                return self.observe(step if self.sharp else mollifier(step)) + variance * weights

            variance = self.variance.to(seen)
            with torch.no_grad():
                residual = self.values.to(seen) - seen.detach()
                step = spread(conjugate_residuals(covariance, residual, self.iterations))
                smooth = self._kept(denoised.smooth.detach() + mollifier(step))
                sharp = None if denoised.sharp is None else self._kept(denoised.sharp.detach() + step)
                if sharp is not None and self.clip:
                    smooth = mollifier(sharp)
                noise = (x_t.detach() - a * smooth) / b
            return Denoised(smooth.to(x_t.dtype), noise.to(x_t.dtype), denoised.log_variance.detach(), sharp)

        return denoise_given

    def _kept(self, estimate: torch.Tensor) -> torch.Tensor:
        return estimate.clamp(-1, 1) if self.clip else estimate


def conjugate_residuals(
    product: Callable[[torch.Tensor], torch.Tensor],
    right: torch.Tensor,
    iterations: int = MOST_ITERATIONS,
    tolerance: float = _TOLERANCE,
) -> torch.Tensor:
    """Solve A w = r for a batch of positive definite A at once, from w = 0; all (B, M).

    Of the family of conjugate gradients, this one (Eisenstat, Elman & Schultz 1983) makes ‖r - A w‖ least over the
    directions tried, so that it never grows. It needs no symmetry, which the covariance of a network has only nearly.
    product: w -> A w, called once for each iteration.
    tolerance: the last iteration is that in which every residual is below it times ‖r‖.
    """
    solution, residual = torch.zeros_like(right), right
    enough = tolerance * right.norm(dim=1, keepdim=True)
    tried: list[tuple[torch.Tensor, torch.Tensor]] = []  # directions p and A p, with A p of unit length and orthogonal
    for _ in range(iterations):
        if not (residual.norm(dim=1, keepdim=True) > enough).any():
            break
        direction, image = residual, product(residual)
        for other, other_image in tried:
            along = (image * other_image).sum(1, keepdim=True)
            direction, image = direction - along * other, image - along * other_image
        length = image.norm(dim=1, keepdim=True)
        direction, image = (torch.where(length > 0, v / length, 0.0) for v in (direction, image))
        along = (residual * image).sum(1, keepdim=True)
        solution, residual = solution + along * direction, residual - along * image
        tried.append((direction, image))
    return solution


def check_measurements(values: torch.Tensor, variance: torch.Tensor) -> None:
    """Raise ValueError for no measurement, one that is not finite, and wrong variances: not one each, finite, ≥ 0."""
    if not values.numel():
        raise ValueError("measurements are none; accepted: at least one")
    if not values.isfinite().all():
        raise ValueError("measurements are not all finite; accepted: finite values")
    fits = tuple(variance.shape) == tuple(values.shape[-1:])
    if not fits or not torch.all((variance >= 0) & (variance < math.inf)):
        found = f"from {float(variance.min()):g} to {float(variance.max()):g}" if fits else f"{tuple(variance.shape)}"
        raise ValueError(
            f"variances are {found}; accepted: one for each of the {values.shape[-1]} measurements, finite, 0 or more"
        )
