"""Conditions on generated images: parts that are known (inpainting), frequencies that are known (super-resolution).

Known pixels x̄ are sharp, and states are mollified. T carries pixels across the edge of a hole, so next to it T x̄ is
not known even where x̄ is. Wherever T x̄ is needed, x̄ is completed inside the hole by an estimate: the sampler's current
one (`Known.guided`), or a smooth surface before there is one (`fill_hole`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from diffusion.coordinates import Size, size_of
from diffusion.cosine import dct, idct, on_rows
from diffusion.mollifier import Mollifier
from diffusion.process import Denoised, Denoiser, DiffusionProcess
from diffusion.samplers import Correction

Image = torch.Tensor
_SURE = 0.99  # fraction of its Gaussian weight that a mollified pixel has from known pixels to count as known


@dataclass(frozen=True)
class Guided(Denoised):
    """Estimates, and the direction in which they move away from the known pixels, shaped like x_t."""

    gradient: torch.Tensor = field(kw_only=True)


@dataclass(frozen=True)
class Known:
    """The known part of images: pixels `image` (B or 1, C, H, W), read only where `mask`, bool (H, W), is true.

    process: that of the sampler. deblur: undoes its mollifier, up to a filter, on (B, C, H, W), where a denoiser gives
    no `Denoised.sharp`.
    Raises ValueError if the mask has another size, or no or only known pixels.
    """

    image: Image
    mask: torch.Tensor
    process: DiffusionProcess
    deblur: Callable[[Image], Image]

    def __post_init__(self) -> None:
        check_mask(self.mask, size_of(self.image))

    def guided(self, denoise: Denoiser, *, plain: bool = False) -> Denoiser:
        """Reconstruction guidance (section 5.3, after Ho et al. 2022b): a denoiser that returns `Guided`, with

            gradient = √ᾱ_t T Tᵗ ∇_{x_t} ‖m ⊙ (μ̃_0(x_t, t) - T x̄)‖².

        The norm is summed over pixels and channels. T x̄ counts as constant; inside the hole x̄ is the sharp estimate, or
        the deblurred one. T Tᵗ ∇ is the gradient in the Cameron-Martin space of T ξ, in which states vary: ∇ itself has
        an edge where the mask has one. The weight √ᾱ_t is that of Ho et al. It cancels the 1/√ᾱ_t in ∇, which is 20000
        at the first step and multiplies the errors of a network. Gradients are switched on inside, whatever the caller
        does.
        plain: ∇ alone, as the paper prints it; a network then takes a very small λ.
        """

        def denoise_and_compare(x_t: torch.Tensor, t: torch.Tensor) -> Guided:
            mollifier = self.process.mollifier
            with torch.enable_grad():
                x_t = x_t.detach().requires_grad_()
                denoised = denoise(x_t, t)
                fixed = _detached(denoised)
                sharp = self.deblur(fixed.smooth) if fixed.sharp is None else fixed.sharp
                target = mollifier(self.completed(sharp))
                missed = self.mask * (denoised.smooth - target)
                (gradient,) = torch.autograd.grad(missed.square().sum(), x_t)
            if not plain:
                gradient = self.process.schedule.at("sqrt_alpha_bar", t, x_t) * mollifier(mollifier(gradient))
            return Guided(fixed.smooth, fixed.noise, fixed.log_variance, fixed.sharp, gradient=gradient)

        return denoise_and_compare

    def completed(self, estimate: Image) -> Image:
        """The known pixels, and those of an estimate (B, C, H, W) elsewhere."""
        return torch.where(self.mask, self.image, estimate)

    def soft_mask(self) -> torch.Tensor:
        """Weights in [0, 1], float32 (H, W): about 1 well inside the known part, and about 0 wherever T x̄ is not known.

        Smooth like a state: a product with the mask itself would have an edge, which no state has.
        """
        weights, mollifier = self.mask.float(), self.process.mollifier
        if mollifier.identity:
            return weights
        for _ in range(2):  # shrink to where T x̄ is known, and again by as much as T will widen it
            weights = (mollifier(weights) >= _SURE).float()
        return mollifier(weights).clamp(0, 1)


def _detached(denoised: Denoised) -> Denoised:
    sharp = None if denoised.sharp is None else denoised.sharp.detach()
    return Denoised(denoised.smooth.detach(), denoised.noise.detach(), denoised.log_variance.detach(), sharp)


def descend(scale: float) -> Correction:
    """The correction x_{t-1} ← x_{t-1} - λ · gradient of samplers with a guided denoiser; scale: λ."""

    def correct(x: torch.Tensor, step: int, denoised: Denoised) -> torch.Tensor:
        if not isinstance(denoised, Guided):
            raise TypeError(f"denoised is {type(denoised).__name__}; accepted: Guided, from `Known.guided`")
        return x - scale * denoised.gradient

    return correct


def follow(states: Sequence[torch.Tensor], weights: torch.Tensor) -> Correction:
    """The correction that holds the known part to its own path, x ← x + w ⊙ (x_known - x), after Lugmayr et al. 2022.

    They draw x_known from q(x_{t-1} | x̄) anew at each step. Here it is the state that DDIM inversion went through:
    these states are consistent with each other, and the path back along them ends at x̄.
    states: by step, with T x̄ at index 0 and the state at step t at index t.
    weights: w, broadcast over (B, C, H, W), from `Known.soft_mask`.
    """
    return lambda x, step, denoised: x + weights.to(x) * (states[max(step - 1, 0)] - x)


def check_mask(mask: torch.Tensor, size: Size) -> None:
    """Raise ValueError unless the mask is bool (H, W) of this size with known and unknown pixels."""
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(size):
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; accepted: torch.bool {tuple(size)}, the size of the image"
        )
    if mask.all() or not mask.any():
        raise ValueError(f"mask has {'no' if mask.all() else 'only'} unknown pixels; accepted: some, not all")


def fill_hole(image: Image, mask: torch.Tensor) -> Image:
    """Continue the known pixels (B, C, H, W) smoothly into the hole, without reading what is there.

    Each pixel takes the Gaussian mean of the known pixels, T(m x̄) / T m. Of the T of 1, 2, 4, … pixels it is the first
    whose reach covers enough of them. mask: bool (H, W), true where known.
    """
    check_mask(mask, size_of(image))
    return _filled(image, mask)


def fill_unknown(image: Image) -> Image:
    """`fill_hole` for images (B, C, H, W) that are NaN where they are not known, each elsewhere and known somewhere."""
    return _filled(image, image.isfinite().all(1, keepdim=True))


def _filled(image: Image, mask: torch.Tensor) -> Image:
    """`fill_hole`, with a mask (H, W) or (B, 1, H, W)."""
    size = size_of(image)
    known = torch.where(mask, image, 0.0)
    # The widest T spreads the known part evenly.
    enough = (0.5 * mask.to(image.dtype).mean((-2, -1), keepdim=True)).clamp(max=0.05)
    filled, missing, sigma = known, ~mask, 1.0
    while missing.any():
        mollifier = Mollifier(sigma, size)
        weight = mollifier(mask.to(image.dtype))
        reached = missing & (weight > enough)
        filled = torch.where(reached, mollifier(known) / weight.maximum(enough), filled)
        missing, sigma = missing & ~reached, 2 * sigma
    return filled


def join_bands(low: Image, high: Image, band: Size) -> Image:
    """The image whose cosine coefficients (k, l) are those of `low` where k < H' and l < W', and those of `high` else.

    low, high: (B, C, H, W). band: (H', W'), the resolution that determines the coefficients taken from `low`.
    """
    spectrum = [on_rows(dct, dct(x)) for x in (low, high)]
    joined = spectrum[1].clone()
    joined[..., : band[0], : band[1]] = spectrum[0][..., : band[0], : band[1]]
    return on_rows(idct, idct(joined))
