"""Functions drawn given measurements of them: a method of `InftyDiff`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from diffusion.coordinates import Size
from diffusion.posterior import Measured, Observe
from diffusion.samplers import Callback
from diffusion.sensors import Sensors, smooth_guess
from infty_diff.images import as_size
from infty_diff.sampling import SamplingOptions

if TYPE_CHECKING:
    from infty_diff.model import InftyDiff

LATENTS = ("sensors", "prior")
ITERATIONS = 5  # of conjugate residuals at each step; each costs a vector-Jacobian product
QUANTISATION = 2 / 255 / 12**0.5  # standard deviation of the rounding of images in [-1, 1] to 8 bits


@torch.no_grad()
def posterior(
    model: InftyDiff,
    sensors: Sensors,
    seeds: Sequence[int] = (0,),
    size: int | Size | None = None,
    options: SamplingOptions | None = None,
    *,
    sharp: bool = False,
    latents: str | torch.Tensor = "sensors",
    rounds: int = 1,
    latent_steps: str | int | None = None,
    batch_size: int = 16,
    deblur: bool = True,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Images given what sensors measure of them, once per seed; no weight is to be tuned.

    At each step the estimate of the network is replaced by its posterior mean (`diffusion.posterior`).

    Args:
        sensors: see there; of as many channels as the model's.
        seeds: one per image.
        size: (H, W), or the side of a square; the training size by default.
        options: sampler and steps; `sampling` by default.
        sharp: whether sensors measure x_0, the image, and not the function T x_0.
        latents: (1 or N, D), "sensors" for those of a smooth surface through the measurements, or "prior" for one drawn
            for each seed. From the first two images vary less than they should, since their latents are certain.
        rounds: draw so often in turn images given latents, and, but for the last, latents of these images. Many rounds
            are a Gibbs sampler of both, and let latents of the prior agree with the measurements.
        latent_steps: step subset of the latent model; all steps by default.
        batch_size: images drawn together. The gradient of the network is held for them.
        deblur: return images; else mollified images, T x_0.
        callback: called as callback(i, t, x, denoised) after each step.
    Returns:
        (N, C, H, W), float32.
    Raises:
        ValueError: when sensors have another number of channels, or latents and rounds are other than these.
    """
    size = as_size(model.config.size if size is None else size)
    if sensors.channels != model.channels:
        raise ValueError(f"sensors measure {sensors.channels} channels; accepted: {model.channels}, those of the model")
    if isinstance(latents, str) and latents not in LATENTS:
        raise ValueError(f"latents is {latents!r}; accepted: {', '.join(LATENTS)}, or a tensor")
    if rounds < 1 or batch_size < 1:
        raise ValueError(f"rounds is {rounds} and batch_size {batch_size}; accepted: whole numbers above 0")
    sampling, observe = options or model.sampling, sensors.observer(model.device)
    readings, variance = (x.to(model.device) for x in (sensors.readings, sensors.variance))
    measured = measurements(model, observe, readings, variance, sampling, sharp)
    if latents == "sensors":
        guess = smooth_guess(observe, readings, variance, model.channels, size)
        latents = model.encode(guess.float().clamp(-1, 1))
    parts = []
    for start in range(0, len(seeds), batch_size):
        some = seeds[start : start + batch_size]
        if isinstance(latents, str):
            own = model.draw_latents(some, latent_steps)
        else:
            own = latents[start : start + len(some)] if len(latents) > 1 else latents.expand(len(some), -1)
        state, fresh = model.initial_noise(some, size), model.step_noise(some, size)
        for left in reversed(range(rounds)):
            images = model.decode(
                own,
                state,
                replace(sampling, clip=False),
                step_noise=fresh,
                guide=measured.posterior,
                deblur=deblur or left > 0,
                callback=callback,
            )
            if left:
                own, state = model.encode(images.clamp(-1, 1)), fresh()
        parts.append(images)
    return torch.cat(parts)


def measurements(
    model: InftyDiff,
    observe: Observe,
    values: torch.Tensor,
    variance: torch.Tensor | float,
    sampling: SamplingOptions,
    sharp: bool,
) -> Measured:
    """What is measured of the functions of a model, of x_0 if `sharp`; `decode` takes its `posterior` as guide.

    Where the network does not predict x_0, it stands for W T x_0, with the filter W that makes the images of results.
    To keep estimates in [-1, 1] as sampling.clip says is left to it: `decode` must not.
    """
    variance = torch.as_tensor(variance, device=values.device).expand(values.shape[-1])
    if not sharp or model.process.gives_sharp:
        seen = observe
    else:
        seen = lambda x: observe(model.deblur(x, sampling.inv_snr))  # noqa: E731
    process = model.process.respaced(sampling.steps)
    in_estimate = sharp and process.gives_sharp
    return Measured(seen, values, variance, process, in_estimate, sampling.clip, ITERATIONS)
