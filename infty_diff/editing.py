"""What a trained model does with given images beside sampling: fill holes, add resolution, blend one into another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from diffusion.conditioning import Known, descend, fill_hole, follow, join_bands
from diffusion.coordinates import Points, Size
from diffusion.process import Denoised
from diffusion.samplers import Callback, Correction
from diffusion.sensors import lower_resolution, pixels
from infty_diff.images import Images, OneImage, as_images, as_size
from infty_diff.posterior import QUANTISATION, measurements
from infty_diff.sampling import SamplingOptions

if TYPE_CHECKING:
    from infty_diff.model import InftyDiff

# On Gaussian random fields the least error in the hole is between 0.2 and 0.4 at 25 to 100 steps; steps of 1 oscillate.
_GUIDANCE = 0.4
_PLAIN_GUIDANCE = 0.003
INPAINTING = ("guidance", "posterior")
SUPER_RESOLUTION = ("encoding", "posterior")


@dataclass(frozen=True)
class InpaintOptions:
    """How holes are filled.

    sampling: sampler, steps, Wiener filter; those of the model by default.
    guidance: λ of reconstruction guidance, 0 for none; by default 0.4, or 0.003 with plain_guidance.
    plain_guidance: the gradient as the paper prints it, see `Known.guided`.
    start_step: t_s, a step of the process as trained, at which sampling starts; the last by default.
    see_hole: encode the whole image, as in the paper, what is in the hole included, to latents and to the state at t_s.
        Else the hole is never looked at: latents come from the known pixels alone, and the state has fresh noise there.
    follow: also hold what is well inside the known part to the states that DDIM inversion went through.
    method: "guidance" holds the known pixels by reconstruction guidance. "posterior" by the posterior mean given them
        (`diffusion.posterior`), which has no λ.
    """

    sampling: SamplingOptions | None = None
    guidance: float | None = None
    plain_guidance: bool = False
    start_step: int | None = None
    see_hole: bool = False
    follow: bool = False
    method: str = "guidance"

    def __post_init__(self) -> None:
        _check_method(self.method, INPAINTING)
        if self.method == "posterior":
            if self.guidance is not None or self.plain_guidance:
                raise ValueError(f"guidance is {self.guidance}; accepted with the method posterior: none")
            object.__setattr__(self, "guidance", 0.0)
        if self.guidance is None:
            object.__setattr__(self, "guidance", _PLAIN_GUIDANCE if self.plain_guidance else _GUIDANCE)
        if not 0 <= self.guidance < 1:
            raise ValueError(f"guidance is {self.guidance}; accepted: 0 for none, to below 1")


@torch.no_grad()
def inpaint(
    model: InftyDiff,
    image: OneImage,
    mask: torch.Tensor,
    seeds: Sequence[int] = (0,),
    options: InpaintOptions | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Fill a hole, once per seed (section 5.3 of the paper).

    Args:
        image: one image, see `infty_diff.images.as_images`; what it has where pixels are unknown is not looked at,
            unless options.see_hole.
        mask: bool (H, W), true where pixels are known.
        seeds: one per result.
        options: see there; InpaintOptions() by default.
        callback: called as callback(i, t, x, denoised) after each step, of DDIM inversion and then of sampling.
    Returns:
        (N, C, H, W), not clamped: whole images; the known pixels are close to those given, not equal.
    Raises:
        ValueError: when the mask has another size than the image, or no or every pixel is known.
    """
    options = options or InpaintOptions()
    sampling, mask = options.sampling or model.sampling, torch.as_tensor(mask, device=model.device)
    image = as_images(image, model.channels, model.device, mask)
    size = tuple(image.shape[-2:])
    seen = image if options.see_hole else fill_hole(image, mask)
    points = Points(size) if options.see_hole else Points(size, mask.flatten().nonzero().T.contiguous())
    latents = model.encode(seen, points)

    process = model.process.respaced(sampling.steps)
    last = process.schedule.num_steps - 1
    start = last if options.start_step is None else process.schedule.step_until(options.start_step)
    states = [process.mollifier(seen)]

    def keep(i: int, t: int, x: torch.Tensor, denoised: Denoised) -> None:
        states.append(x)
        if callback is not None:
            callback(i, t, x, denoised)

    code = model.encode_stochastic(seen, latents, sampling.steps, stop=start, callback=keep)
    known = Known(image, mask, process, lambda x: model.deblur(x, sampling.inv_snr))
    soft = known.soft_mask()
    if not options.see_hole:
        alpha_bar = float(process.schedule.alpha_bar[start])
        code = _noise_in_hole(code, states[0], soft, alpha_bar, model.initial_noise(seeds, size))

    guidance, guide, drawn = options.guidance, None, sampling
    if options.method == "posterior":
        values = image[..., mask].flatten()
        guide = measurements(model, pixels(mask), values, QUANTISATION**2, sampling, sharp=True).posterior
        drawn = replace(sampling, clip=False)
    elif guidance:
        guide = partial(known.guided, plain=options.plain_guidance)
    corrections: list[Correction] = [descend(guidance)] if guidance else []
    corrections += [follow(states, soft)] if options.follow else []
    results = model.decode(
        latents.expand(len(seeds), -1),
        code.expand(len(seeds), -1, -1, -1),
        drawn,
        step_noise=model.step_noise(seeds, size),
        start=start,
        guide=guide,
        correct=_chain(corrections),
        callback=callback,
    )
    if options.follow and process.gives_sharp:  # states hold what T leaves of known pixels, the network adds its own
        results = results + soft * (seen - results)
    return results


def _noise_in_hole(
    code: torch.Tensor, clean: torch.Tensor, soft: torch.Tensor, alpha_bar: float, noise: torch.Tensor
) -> torch.Tensor:
    """States like the code, but with fresh noise in the hole, and of the variance of a state where the two blend.

    A state is √ᾱ T x_0 + √(1 − ᾱ) ε. Of ε, w is kept and √(1 − w²) T ξ added, with w the soft mask.
    """
    signal = alpha_bar**0.5 * clean
    return signal + soft * (code - signal) + ((1 - alpha_bar) * (1 - soft**2)).sqrt() * noise


def _chain(corrections: Sequence[Correction]) -> Correction:
    def correct(x: torch.Tensor, step: int, denoised) -> torch.Tensor:
        for correction in corrections:
            x = correction(x, step, denoised)
        return x

    return correct


@torch.no_grad()
def super_resolve(
    model: InftyDiff,
    images: Images,
    size: int | Size,
    seeds: Sequence[int] | None = None,
    options: SamplingOptions | None = None,
    encoding_step: int | None = None,
    callback: Callback | None = None,
    method: str = "encoding",
) -> torch.Tensor:
    """Show images at a higher resolution (section 5.3 of the paper): encode them, and decode on a finer lattice.

    The latent alone keeps the content, not every detail. With `encoding_step` sampling starts from a state at that step
    whose cosine coefficients, as far as the given lattice determines them, are those that DDIM inversion leads the
    enlarged image to. The finer ones are fresh noise: inverted, they would only return the smooth enlarged image.

    With the method "posterior" the results are also held to what they must be, reduced again: by the posterior mean
    given the images as measurements (`diffusion.posterior`).

    Args:
        images: B images of size (h, w), see `infty_diff.images.as_images`.
        size: (H, W), at least (h, w), or the side of a square.
        seeds: one per image; 0 to B - 1 by default.
        options: sampler, steps, Wiener filter; `model.sampling` by default.
        encoding_step: step of the process as trained at which sampling starts, or None for noise.
        callback: called as callback(i, t, x, denoised) after each step, of DDIM inversion, if any, and of sampling.
        method: "encoding" or "posterior".
    Returns:
        (B, C, H, W), not clamped.
    Raises:
        ValueError: when `size` is smaller than the images.
    """
    _check_method(method, SUPER_RESOLUTION)
    images, size = as_images(images, model.channels, model.device), as_size(size)
    seeds, sampling = range(len(images)) if seeds is None else seeds, options or model.sampling
    band = tuple(images.shape[-2:])
    if size[0] < band[0] or size[1] < band[1]:
        raise ValueError(f"size is {size}; accepted: at least that of the images, {band}")
    latents, state, start = model.encode(images), model.initial_noise(seeds, size), None
    if encoding_step is not None:
        schedule = model.process.respaced(sampling.steps).schedule
        start = schedule.step_until(encoding_step)
        large = enlarged(images, size)
        code = model.encode_stochastic(large, latents, sampling.steps, stop=start, callback=callback)
        alpha_bar = float(schedule.alpha_bar[start])
        fresh = alpha_bar**0.5 * model.process.mollifier(large) + (1 - alpha_bar) ** 0.5 * state
        state = join_bands(code, fresh, band)
    guide = None
    if method == "posterior":
        reduce, values = lower_resolution(band), images.flatten(1)
        guide = measurements(model, reduce, values, QUANTISATION**2, sampling, sharp=True).posterior
        sampling = replace(sampling, clip=False)
    step_noise = model.step_noise(seeds, size)
    return model.decode(latents, state, sampling, step_noise=step_noise, start=start, guide=guide, callback=callback)


@torch.no_grad()
def interpolate(
    model: InftyDiff,
    ends: Images | Sequence[int],
    weights: int | Sequence[float] = 9,
    options: SamplingOptions | None = None,
    *,
    size: int | Size | None = None,
    noise: str | int = "code",
    latents: str = "lerp",
    done: Callable[[int, torch.Tensor], None] | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Blend one image into another, or one sample into another.

    Latents are joined by a line and noises by a great circle, which keeps their variance.

    Args:
        ends: two images, see `infty_diff.images.as_images`, or the seeds of two samples.
        weights: of the second end, in [0, 1], a picture each; or how many evenly spaced ones, both ends included.
        options: with a sampler that draws no noise at its steps; `model.sampling` by default.
        size: (H, W) of samples, or the side of a square; by default the training size. Images have their own.
        noise: of images, "code" for the noises that DDIM inversion finds for them, so that the ends are the images
            themselves; or a seed, whose noise is then that of the whole way.
        latents: "lerp", or "slerp" for a great circle.
        done: called as done(i, image) with each picture when it is there.
        callback: called as callback(i, t, x, denoised) after each step, of DDIM inversion, if any, and of sampling.
    Returns:
        (N, C, H, W), not clamped.
    Raises:
        ValueError: when the sampler draws noise, there are not two ends, or samples are asked of a model without prior.
    """
    sampling = options or model.sampling
    require_no_noise(sampling)
    if latents not in _WAYS:
        raise ValueError(f"latents is {latents!r}; accepted: {', '.join(_WAYS)}")
    if len(ends) != 2:
        raise ValueError(f"ends are {len(ends)}; accepted: two images, or two seeds")
    if all(isinstance(end, Integral) for end in ends):
        places = model.draw_latents(ends)
        noises = model.initial_noise(ends, model.config.size if size is None else size)
    else:
        images = as_images(ends, model.channels, model.device)
        places = model.encode(images)
        if noise == "code":
            noises = model.encode_stochastic(images, places, sampling.steps, callback=callback)
        else:
            noises = model.initial_noise([noise] * 2, tuple(images.shape[-2:]))
    parts = torch.linspace(0, 1, weights) if isinstance(weights, int) else torch.tensor(weights)
    pictures = []
    for i, (place, start) in enumerate(zip(_WAYS[latents](*places, parts), slerp(*noises, parts))):
        pictures.append(model.decode(place[None], start[None], sampling, callback=callback)[0])
        if done is not None:
            done(i, pictures[-1])
    return torch.stack(pictures)


def _check_method(method: str, accepted: Sequence[str]) -> None:
    if method not in accepted:
        raise ValueError(f"method is {method!r}; accepted: {', '.join(accepted)}")


def require_no_noise(sampling: SamplingOptions) -> None:
    """Raise ValueError for a sampler that draws noise at its steps, with which a way has jumps."""
    if sampling.draws_noise:
        raise ValueError(
            f"sampler is {sampling.sampler!r}, eta {sampling.eta:g}, which draws noise at every step and breaks the "
            "way; accepted: ddim or dpmpp, and 0"
        )


def enlarged(images: torch.Tensor, size: Size) -> torch.Tensor:
    """Images (B, C, H, W) on a finer lattice by bicubic interpolation, in [−1, 1]."""
    return functional.interpolate(images, size, mode="bicubic", align_corners=False).clamp(-1, 1)


def lerp(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Points (N, ...) on the straight line from a to b, both (...), at the weights (N,) of b."""
    weights = weights.to(a).reshape(-1, *(1,) * a.ndim)
    return (1 - weights) * a + weights * b


def slerp(a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Points (N, ...) on the great circle from a to b, both (...), at the parts (N,) of their angle.

    Keeps the variance of noise, which the straight line halves midway. Parallel vectors are joined by that line.
    """
    cosine = torch.sum(a.double() * b.double()) / (a.double().norm() * b.double().norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if not torch.sin(angle) > 1e-6:
        return lerp(a, b, weights)
    weights = weights.to(angle).reshape(-1, *(1,) * a.ndim)
    parts = torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b
    return (parts / torch.sin(angle)).to(a.dtype)


_WAYS = {"lerp": lerp, "slerp": slerp}
