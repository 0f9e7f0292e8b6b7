"""The model as a researcher uses it: encode, encode_stochastic, decode, sample."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from configs.schema import ImageConfig
from data.units import FieldUnits
from diffusion.coordinates import (
    Points,
    Size,
    gather_points,
    image_to_points,
    points_to_image,
    size_of,
    validate_points,
)
from diffusion.factory import build_image_process
from diffusion.mollifier import InverseSnr
from diffusion.noise import function_noise
from diffusion.process import Denoised, Denoiser, DiffusionProcess
from diffusion.random import Purpose, key
from diffusion.samplers import SAMPLERS, Callback, Correction, LastEstimate, ddim_invert
from diffusion.spectrum import Spectrum
from infty_diff.cast_weights import cast_weights
from infty_diff.editing import inpaint, interpolate, super_resolve
from infty_diff.filter_file import parse_inv_snr
from infty_diff.growing import data_spectrum, sampled_denoiser
from infty_diff.images import Images, as_images, as_size
from infty_diff.latent_prior import LatentPrior
from infty_diff.loading import from_runs, inverse_snr, provenance, save
from infty_diff.posterior import posterior
from infty_diff.sampling import SamplingOptions
from infty_diff.values import evaluate
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseUNet
from runtime.precision import Precision, pick_device


class InftyDiff:
    """Encoder, denoiser, latent prior and diffusion process of one trained model.

    Given images are whatever `infty_diff.images.as_images` takes, at any (H, W): floats in [−1, 1], uint8, PIL.
    Returned images are float32 (B, C, H, W) on the model's device, not clamped: the filter that undoes the
    mollifier overshoots [−1, 1] at edges. `infty_diff.to_pil` and `to_uint8` clamp. Latents are (B, D). Gradients are
    computed by `encode` alone, and there where images require them.

    Args:
        config: configuration of stage one.
        encoder, denoiser: its networks, on the device to run on; put into evaluation mode.
        prior: the latent model of stage two; needed by `sample` alone.
        precision: autocast type; full precision by default.
        sampling: what methods take where they are given no options.
        trained: steps of training by stage, "image" and "latent", as far as known.
        files: the weights that it was loaded from, by stage, if it was.
        spectrum: of the training data, if known; see `data_spectrum`.
        units: of fields, which `units.undo` gives results and `units.apply` takes away; None for images.
    """

    def __init__(
        self,
        config: ImageConfig,
        encoder: SparseEncoder,
        denoiser: SparseUNet,
        prior: LatentPrior | None = None,
        precision: Precision | None = None,
        sampling: SamplingOptions | None = None,
        trained: Mapping[str, int] | None = None,
        files: Mapping[str, Path] | None = None,
        spectrum: Spectrum | None = None,
        units: FieldUnits | None = None,
    ) -> None:
        self.config, self.prior, self.trained, self.files = config, prior, dict(trained or {}), dict(files or {})
        self.encoder, self.denoiser = encoder.eval(), denoiser.eval()
        self.process = build_image_process(config)
        self.precision, self._autocast = precision or Precision(self.device, None), precision is not None
        self.sampling, self.spectrum, self.units = sampling or SamplingOptions(), spectrum, units
        self.calibrated: InverseSnr | None = None  # the filter stored with the weights, once it was asked for

    from_runs = classmethod(from_runs)
    save = save
    provenance = provenance
    inverse_snr = inverse_snr
    data_spectrum = data_spectrum

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.denoiser.parameters()).device

    @property
    def channels(self) -> int:
        """Channels C of an image."""
        return self.config.data.channels

    def to(self, device: str | int | torch.device) -> InftyDiff:
        """Move the networks, as `torch.nn.Module.to` does, and return the model; `device` as in `from_runs`."""
        where, train = pick_device(device), self.config.train
        for part in (self.encoder, self.denoiser, *([] if self.prior is None else [self.prior])):
            part.to(where)
        self.precision = Precision.create(where, train.amp and self._autocast, train.amp_dtype)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of encoder, denoiser and prior."""
        networks = [self.encoder, self.denoiser, *([] if self.prior is None else [self.prior.model])]
        return itertools.chain.from_iterable(network.parameters() for network in networks)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        precision = str(self.precision.dtype or torch.float32).removeprefix("torch.")
        steps = ", ".join(f"{stage} {step}" for stage, step in self.trained.items()) or "unknown"
        return (
            f"InftyDiff({self.config.run.experiment}: trained at {self.config.size[0]}x{self.config.size[1]} with "
            f"{self.channels} channels; {'with' if self.prior else 'no'} prior; {count / 1e6:.2f} M parameters; "
            f"steps of training: {steps}; {self.device}, {precision})"
        )

    def in_full_precision(self) -> InftyDiff:
        """The same networks without autocast."""
        known = {"sampling": self.sampling, "trained": self.trained, "files": self.files}
        known |= {"spectrum": self.spectrum, "units": self.units}
        return InftyDiff(self.config, self.encoder, self.denoiser, self.prior, **known)

    def encode_distribution(
        self, images: Images, points: Points | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents (B, D) of images, and their log-variance for a stochastic encoder, else None.

        points: the pixels to look at, by default all; of fields all that are known, where no channel is NaN.
        """
        images = as_images(images, self.channels, self.device, unknown=points is None and self.units is not None)
        if points is None and images.isnan().any():
            known = images.isfinite().all(1).flatten(1)
            if not known.any(1).all():
                raise ValueError("images have no known pixel; accepted: some in each, and NaN where none is known")
            some = [Points(size_of(images), mask.nonzero().T) for mask in known]
            found = [self.encode_distribution(image[None].nan_to_num(), p) for image, p in zip(images, some)]
            means, spreads = zip(*found)
            return torch.cat(means), None if spreads[0] is None else torch.cat(spreads)
        if points is None:
            points = Points(tuple(images.shape[-2:]))
        validate_points(points)
        wanted = torch.is_grad_enabled() and images.requires_grad
        with torch.set_grad_enabled(wanted), self.precision.autocast():
            encoding = self.encoder(gather_points(images, points), points)
        if self.config.model.stochastic_encoding:
            return encoding.mu.float(), encoding.logvar.float()
        return encoding.float(), None

    def encode(self, images: Images, points: Points | None = None) -> torch.Tensor:
        """Latents (B, D) of images, by default of every pixel; of a stochastic encoder the mean."""
        return self.encode_distribution(images, points)[0]

    @torch.no_grad()
    def encode_stochastic(
        self,
        images: Images,
        latents: torch.Tensor | None = None,
        steps: str | int = "100",
        *,
        stop: int | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """The noise (B, C, H, W), mollified, from which DDIM with the same `steps` returns the images.

        Args:
            images: B of them.
            latents: (B, D); those of the images by default.
            steps: step subset of the inversion.
            stop: the step of the subset whose state is returned, by default the last.
            callback: called as callback(i, t, x, denoised) after each step.
        """
        images, steps = as_images(images, self.channels, self.device), str(steps)
        latents = self.encode(images) if latents is None else self._latents(latents)
        process = self.process.respaced(steps)
        denoise = self.denoiser_at(latents, process, clip=False)
        return ddim_invert(denoise, process.mollifier(images), process, stop=stop, callback=callback)

    @torch.no_grad()
    def decode(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        options: SamplingOptions | None = None,
        *,
        step_noise: Callable[[], torch.Tensor] | None = None,
        start: int | None = None,
        guide: Callable[[Denoiser], Denoiser] | None = None,
        correct: Correction | None = None,
        deblur: bool = True,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Images drawn from latents and mollified noise.

        Args:
            latents: (B, D).
            noise: (B, C, H, W), mollified: from `initial_noise` or `encode_stochastic`; its size is the images' size.
            options: sampler and steps; `sampling` by default.
            step_noise: returns mollified noise for the steps of a stochastic sampler.
            start: the step of the subset at which `noise` is the state, by default the last.
            guide, correct: wrap the denoiser, and correct each state (see `diffusion.conditioning`).
            deblur: undo the mollifier, see `sharpened`; else the mollified images are returned.
            callback: called as callback(i, t, x, denoised) after each step.
        Returns:
            (B, C, H, W), float32, not clamped.
        Raises:
            ValueError: when latents or noise have another shape.
        """
        options, latents = options or self.sampling, self._latents(latents)
        noise = torch.as_tensor(noise, dtype=torch.float32, device=self.device)
        if noise.ndim != 4 or noise.shape[:2] != (len(latents), self.channels):
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; accepted: ({len(latents)}, {self.channels}, H, W), one for "
                "each latent"
            )
        self.inverse_snr(options.inv_snr)  # what is missing must not wait for the last step
        process = self.process.respaced(options.steps)
        denoise = sampled_denoiser(self, latents, size_of(noise), process, options)
        denoise = denoise if guide is None else guide(denoise)
        last = LastEstimate(callback)
        draw = SAMPLERS[options.sampler].with_eta(options.eta)
        x = draw(denoise, noise, process, noise=step_noise, start=start, correct=correct, callback=last)
        return self.sharpened(x, last.denoised, options.inv_snr) if deblur else x

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        size: int | Size | None = None,
        options: SamplingOptions | None = None,
        *,
        latent_steps: str | int | None = None,
        batch_size: int = 16,
        deblur: bool = True,
        progress: bool | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Images (B, C, H, W) drawn from the prior, each a function of its own seed alone.

        Args:
            seeds: one per image.
            size: (H, W), or the side of a square; the training size by default.
            options: sampler and steps; `sampling` by default.
            latent_steps: step subset of the latent model; all steps by default.
            batch_size: images drawn together.
            deblur: undo the mollifier; else the mollified images are returned, for `deblur` with any inv_snr.
            progress: show a bar; by default on a terminal, for more than one batch.
            callback: as in `decode`; called in each batch.
        Raises:
            ValueError: when the model was loaded without a latent run, or seeds are not whole numbers from 0.
        """
        size = as_size(self.config.size if size is None else size)
        seeds = _checked_seeds(seeds)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; accepted: a whole number above 0")
        images, hidden = [], None if len(seeds) > batch_size else True
        with tqdm(total=len(seeds), unit="image", disable=hidden if progress is None else not progress) as bar:
            for start in range(0, len(seeds), batch_size):
                batch = seeds[start : start + batch_size]
                latents, noise = self.draw_latents(batch, latent_steps), self.initial_noise(batch, size)
                hooks = {"step_noise": self.step_noise(batch, size), "deblur": deblur, "callback": callback}
                images.append(self.decode(latents, noise, options, **hooks))
                bar.update(len(batch))
        return torch.cat(images)

    def draw_latents(self, seeds: Sequence[int], steps: str | int | None = None) -> torch.Tensor:
        """Latents (B, D) from the prior, each a function of its own seed alone; steps: of the latent model, or all.

        Raises:
            ValueError: when the model was loaded without a latent run.
        """
        if self.prior is None:
            raise ValueError("sampling needs the latent model of stage two: load the model with its latent run")
        return self.prior.sample(seeds, None if steps is None else str(steps))

    super_resolution = super_resolve
    inpaint = inpaint
    interpolate = interpolate
    evaluate = evaluate
    posterior = posterior

    def _latents(self, latents: torch.Tensor) -> torch.Tensor:
        latents = torch.as_tensor(latents, dtype=torch.float32, device=self.device)
        if latents.ndim != 2 or latents.shape[1] != self.config.model.z_dim:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; accepted: (B, {self.config.model.z_dim})")
        return latents

    def initial_noise(self, seeds: Sequence[int], size: int | Size) -> torch.Tensor:
        """Mollified noise T ξ (B, C, H, W): for one seed the same function at every size."""
        return self._noise(seeds, size, Purpose.IMAGE)

    def step_noise(self, seeds: Sequence[int], size: int | Size) -> Callable[[], torch.Tensor]:
        """The source of mollified noise for stochastic samplers: a new draw per call, a function of the seeds."""
        calls = itertools.count()
        return lambda: self._noise(seeds, size, Purpose.IMAGE_STEP, next(calls))

    def _noise(self, seeds: Sequence[int], size: int | Size, purpose: Purpose, *indices: int) -> torch.Tensor:
        keys = [key(seed, purpose, *indices) for seed in seeds]
        return self.process.mollifier.noise(function_noise(keys, self.channels, as_size(size), self.device))

    def sharpened(self, x: torch.Tensor, last: Denoised | None, inv_snr: float | str | None = None) -> torch.Tensor:
        """The images (B, C, H, W) that a sampler's result x stands for.

        Where the network predicts x_0, they are its last x̂_0, to which no filter W is applied:

            x̂_0 + W (x - T x̂_0).

        The difference is what a correction of the last state added, and zero without one. For other predictions they
        are W x.
        last: the estimates of the last step (see `LastEstimate`); None where no x̂_0 is needed.
        Raises ValueError without them where the image is x̂_0.
        """
        if last is None and self.process.gives_sharp:
            raise ValueError(
                "the sampler called no callback; accepted: one that calls callback(i, t, x, denoised) after each step, "
                "for the network's last estimate is the image"
            )
        if last is None or last.sharp is None:
            return self.deblur(x, inv_snr)
        return last.sharp + self.deblur(x - last.smooth, inv_snr)

    def deblur(self, x: torch.Tensor, inv_snr: float | str | None = None) -> torch.Tensor:
        """Undo the mollifier by the Wiener filter; inv_snr as in `SamplingOptions`, that of `sampling` by default.

        White-noise diffusion has nothing to undo; the truncated convolution has no inverse, so its images stay as
        they are.
        """
        ratio = self.inverse_snr(self.sampling.inv_snr if inv_snr is None else parse_inv_snr(inv_snr))
        return self.process.mollifier.inverse(x, ratio) if self.process.mollifier.kind == "dct" else x

    def denoiser_at(self, latents: torch.Tensor, process: DiffusionProcess, clip: bool = True) -> Denoiser:
        """The denoiser of samplers: states (B, C, H, W) of any size and steps t (B,) of a process to estimates.

        Gradients are computed where a state requires them, as in guidance, and else not, whatever the caller's mode.
        """
        latents, denoiser = latents.to(self.device), cast_weights(self.denoiser, self.precision.dtype)
        with torch.no_grad(), self.precision.autocast():  # a network of the caller's own takes the latents themselves
            condition = denoiser.conditioning(latents) if isinstance(denoiser, SparseUNet) else latents

        def network(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            wanted, points = torch.is_grad_enabled() and x_t.requires_grad, Points(size_of(x_t))
            with torch.set_grad_enabled(wanted), self.precision.autocast():
                return points_to_image(denoiser(image_to_points(x_t), points, time, condition).float(), points.size)

        return process.denoiser(network, clip)


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    try:
        numbers = [operator.index(seed) for seed in seeds]
    except TypeError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ValueError(
            f"seeds are {seeds!r}; accepted: whole numbers from 0, one per image, such as range(8) or [3, 7]"
        )
    return numbers
