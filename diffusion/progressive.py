"""A denoiser evaluated on a lattice that grows while a function is drawn from noise.

The cosine coefficient (k, l) of a state x_t = a T x_0 + b T ξ, with a = √ᾱ_t and b = √(1 - ᾱ_t), has the power
τ² σ²,

    σ² = a² c + b²,

with the gain τ of the mollifier and the power c of the data (`diffusion.spectrum`), up to a factor that is the number
of pixels for all. Where a² c is small against b², a wave is noise. A network learns nothing from it, and says nothing
of it that could be relied on. So it is not asked: it sees the lattice that holds the other waves, and what lies beyond
follows from the spectrum alone, by the best linear estimate

    T x̂_0 = a c / σ² · x_t.

With it a deterministic sampler keeps such a wave at σ τ ξ up to the length of its steps: b τ ξ, times σ / b. Without,
at b τ ξ, the wave would have lost the part a² c / σ² of its power. The sampler itself knows nothing of this. Its states
have all pixels, so that every sampler, correction and guidance works as ever, and one seed is one function.

For Gaussian fields and their best denoiser, which is that same estimate, nothing is lost at all.
"""

from __future__ import annotations

import math

import torch

from diffusion.coordinates import Size
from diffusion.cosine import dct, idct, on_rows
from diffusion.mollifier import Mollifier
from diffusion.process import Denoised, Denoiser, DiffusionProcess
from diffusion.spectrum import Spectrum, require_functions

GROWTH = 2**0.5  # of the sides of two lattices; each new one costs a network some preparation
_INVISIBLE = 1e-6  # the gain of waves that are lost in the rounding of a float32 state


def lattices(
    process: DiffusionProcess, spectrum: Spectrum, size: Size, delta: float, growth: float = GROWTH
) -> list[Size]:
    """The lattice (h, w) on which the denoiser is evaluated, by step of the process; at step 0 all of `size`.

    It is the smallest of a row of lattices whose missing waves all have a² c ≤ δ b², or τ below the rounding of states.
    The row begins with the training resolution and grows by a factor; no axis exceeds `size`.

    Args:
        process: with a mollifier of kind "dct" above 0.
        spectrum: of its data.
        size: (H, W), of the states.
        delta: δ, 0 or more; 0 evaluates all waves that the mollifier leaves.
        growth: above 1; inf goes from the training resolution to `size` at once.
    Raises:
        ValueError: for another mollifier, delta or growth.
    """
    require_functions(process.mollifier)
    if not 0 <= delta < math.inf or not growth > 1:
        raise ValueError(f"delta is {delta}, growth {growth}; accepted: 0 or more, and above 1")
    row = _row(process.mollifier.train_size, size, growth)
    alpha_bar = process.schedule.alpha_bar
    found = []
    for step in range(process.schedule.num_steps):
        most = delta * float((1 - alpha_bar[step]) / alpha_bar[step])
        fits = (lattice for lattice in row if _fits(lattice, size, process.mollifier, spectrum, most))
        found.append(size if step == 0 else next(fits))
    return found


def _row(train_size: Size, size: Size, growth: float) -> list[Size]:
    """Lattices from the training resolution to `size`, within it."""
    row, factor, ratio = [], 1.0, max(own / trained for own, trained in zip(size, train_size))
    while factor < ratio:
        height, width = (min(own, round(factor * trained)) for own, trained in zip(size, train_size))
        row.append((height, width))
        factor *= growth
    return [*row, size]


def _fits(lattice: Size, size: Size, mollifier: Mollifier, spectrum: Spectrum, most: float) -> bool:
    """Whether no wave that `size` has and `lattice` has not needs a network: power above `most`, and not smoothed away.

    The spectrum falls from the training band on, and so does the gain: the longest of these waves decides.
    """
    missing = [n / trained for n, own, trained in zip(lattice, size, mollifier.train_size) if n < own]
    if not missing:
        return True
    longest = torch.tensor(min(missing), dtype=torch.float64)
    gain = math.exp(-0.5 * (math.pi * mollifier.sigma * float(longest)) ** 2)
    return gain < _INVISIBLE or float(spectrum.at(longest)) <= most


def progressive(
    denoise: Denoiser,
    process: DiffusionProcess,
    spectrum: Spectrum,
    size: Size,
    delta: float,
    growth: float = GROWTH,
) -> Denoiser:
    """The denoiser of states (B, C, H, W) that asks another one on the lattice of each step alone.

    At the training resolution and below, it is the other one.

    Args:
        denoise: takes states of any size.
        process: that of the sampler.
        spectrum, size, delta, growth: see `lattices`.
    Raises:
        ValueError: as `lattices`.
    """
    by_step = lattices(process, spectrum, size, delta, growth)
    power = spectrum.at(process.mollifier.frequencies(size))

    def denoise_grown(x_t: torch.Tensor, t: torch.Tensor) -> Denoised:
        nonlocal power
        lattice = by_step[int(t[0])]
        if lattice == size:
            return denoise(x_t, t)
        h, w = lattice
        work = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        scale = math.sqrt(h * w / math.prod(size))  # of coefficients, which grow with the number of pixels
        spectrum_t = on_rows(dct, dct(work))
        low = on_rows(idct, idct(scale * spectrum_t[..., :h, :w]))
        found = denoise(low.to(x_t.dtype), t)
        a, b = (process.schedule.at(name, t, work) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
        power = power.to(work)
        beyond = a * power / (a**2 * power + b**2) * spectrum_t

        def whole(part: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
            rest = rest.clone()
            rest[..., :h, :w] = on_rows(dct, dct(part.to(work))) / scale
            return on_rows(idct, idct(rest)).to(x_t.dtype)

        smooth, nothing = whole(found.smooth, beyond), torch.zeros_like(spectrum_t)
        noise = ((work - a * smooth) / b).to(x_t.dtype)
        log_variance = found.log_variance
        if log_variance.shape[-2:] == lattice:  # learned for each pixel
            log_variance = whole(log_variance, nothing)
        # Beyond, the sharp estimate is T x̂_0 over a gain that may be zero; no sampler needs it before the last step.
        sharp = None if found.sharp is None else whole(found.sharp, nothing)
        return Denoised(smooth, noise, log_variance, sharp)

    return denoise_grown
