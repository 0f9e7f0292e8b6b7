"""The model as a researcher uses it: encode, encode_stochastic, decode, sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import ImageConfig, LatentConfig
from diffusion.coordinates import Points, Size, gather_points, image_to_points, points_to_image
from diffusion.factory import build_image_process
from diffusion.mollifier import InverseSnr
from diffusion.noise import function_noise
from diffusion.process import Denoised, Denoiser
from diffusion.random import Purpose, key
from diffusion.samplers import Callback, Correction, LastEstimate, ancestral, ddim, ddim_invert, dpmpp
from infty_diff.cast_weights import cast_weights
from infty_diff.filter_file import CALIBRATED, filter_path, load_filter, parse_inv_snr
from infty_diff.latent_prior import LatentPrior
from models.factory import build_denoiser, build_encoder, for_evaluation
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseUNet
from runtime.checkpoint import load_weights
from runtime.files import file_digest
from runtime.precision import Precision, pick_device
from runtime.stored import config_from, weights_path


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn from noise.

    steps: step subset, "100", "ddim50", "10,15,20" or "logsnr20"; by default 100, and 20 for "dpmpp", which takes a
    mere number as that many steps even in log-SNR. sampler: "ddim", "ddpm" or "dpmpp". eta: noise of DDIM, in [0, 1].
    inv_snr: inverse signal-to-noise ratio of the Wiener filter that undoes the mollifier, where the network does not
    predict the image itself: a number or its text, or "calibrated" for what is stored with the weights. clip: keep
    estimates of the clean image in [−1, 1]; without it DDIM inverts `encode_stochastic` exactly in the limit of many
    steps.
    """

    steps: str | None = None
    sampler: str = "ddim"
    eta: float = 0.0
    inv_snr: float | str = 0.05
    clip: bool = True

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r}; accepted: {', '.join(SAMPLERS)}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta={self.eta}; accepted: 0 to 1")
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(f"eta={self.eta}; accepted: 0, since {self.sampler} has no such choice")
        object.__setattr__(self, "inv_snr", parse_inv_snr(self.inv_snr))
        steps = self.steps or _DEFAULT_STEPS[self.sampler]
        if self.sampler == "dpmpp" and steps.isdecimal():
            steps = f"logsnr{steps}"
        object.__setattr__(self, "steps", steps)


class InftyDiff:
    """Encoder, denoiser, latent prior and diffusion process of one trained model.

    Images are (B, C, H, W) in [−1, 1] at any (H, W); latents are (B, D). Nothing here computes gradients.

    Args:
        config: configuration of stage one.
        encoder, denoiser: its networks, on the device to run on; put into evaluation mode.
        prior: the latent model of stage two; needed by `sample` alone.
        precision: autocast type; full precision by default.
        files: of the weights it was loaded from, "image_run" and "latent_run", if it was.
    """

    def __init__(
        self,
        config: ImageConfig,
        encoder: SparseEncoder,
        denoiser: SparseUNet,
        prior: LatentPrior | None = None,
        precision: Precision | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.config, self.prior, self.files = config, prior, dict(files or {})
        self.encoder, self.denoiser = encoder.eval(), denoiser.eval()
        self.process = build_image_process(config)
        self.device = next(denoiser.parameters()).device
        self.precision = precision or Precision(self.device, None)
        self._calibrated: InverseSnr | None = None

    @classmethod
    def from_runs(
        cls,
        image_run: str | Path,
        latent_run: str | Path | None = None,
        device: str = "auto",
        given: ImageConfig | None = None,
        latent_given: LatentConfig | None = None,
        weights: str = "newest",
        latent_weights: str = "newest",
    ) -> InftyDiff:
        """Load the averaged weights of a stage-one run, and of a stage-two run if samples are wanted.

        Args:
            image_run, latent_run: folders of the runs.
            device: "auto", "cpu" or "cuda".
            given, latent_given: in place of the stored configurations, the same but for what does not shape what was
                trained (`runtime.stored.relocate`), as a `Command` hands them on: the back end, where data are.
            weights, latent_weights: of each run, "newest" or "best", those with the least loss on held-out data.
        Raises:
            ValueError: when a folder holds no such weights, or the latents of the two runs differ in size.
        """
        where = pick_device(device)
        files = {"image_run": weights_path(Path(image_run), weights)}
        tensors, header = load_weights(files["image_run"])
        config = given or config_from(header["config"], ImageConfig, str(image_run))
        networks = {
            "encoder": build_encoder(config.model, config.data.channels, config.size),
            "denoiser": build_denoiser(config.model, config.data.channels, config.size),
        }
        for name, network in networks.items():
            prefix = f"{name}."
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            for_evaluation(network).to(where)
        prior = None
        if latent_run is not None:
            files["latent_run"] = weights_path(Path(latent_run), latent_weights)
            latent_tensors, latent_header = load_weights(files["latent_run"])
            latent_config = latent_given or config_from(latent_header["config"], LatentConfig, str(latent_run))
            prior = LatentPrior.from_tensors(latent_config, latent_tensors, where)
            if prior.dim != config.model.z_dim:
                raise ValueError(
                    f"{latent_run} draws latents of size {prior.dim}; {image_run} decodes "
                    f"model.z_dim={config.model.z_dim}"
                )
        precision = Precision.create(where, config.train.amp, config.train.amp_dtype)
        return cls(config, networks["encoder"], networks["denoiser"], prior, precision, files)

    def in_full_precision(self) -> InftyDiff:
        """The same networks without autocast."""
        return InftyDiff(self.config, self.encoder, self.denoiser, self.prior, files=self.files)

    def provenance(self, options: SamplingOptions) -> dict[str, str]:
        """What identifies the model in a folder of results: name and SHA-256 of its files, the filter's if it is used.

        Raises:
            ValueError: when the options ask for a calibrated filter and none is stored with the weights.
        """
        self.inverse_snr(options.inv_snr)
        known = {name: file_digest(path) for name, path in self.files.items()}
        known |= {f"{name}_weights": path.name for name, path in self.files.items()}
        if options.inv_snr == CALIBRATED:
            known["filter"] = file_digest(filter_path(self.files["image_run"]))
        return known

    def inverse_snr(self, inv_snr: float | str) -> float | InverseSnr:
        """What `SamplingOptions.inv_snr` stands for.

        Raises:
            ValueError: when it is "calibrated", and no filter calibrated for the weights is stored with them.
        """
        if inv_snr != CALIBRATED:
            return inv_snr
        if self._calibrated is None:
            if "image_run" not in self.files:
                raise ValueError(f"inv_snr={CALIBRATED}: accepted: with a model that was loaded from a run")
            self._calibrated = load_filter(self.files["image_run"], self.process.mollifier)
        return self._calibrated

    @torch.no_grad()
    def encode_distribution(
        self, images: torch.Tensor, points: Points | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents (B, D) of images (B, C, H, W), and their log-variance for a stochastic encoder, else None.

        points: the pixels to look at, every one by default.
        """
        images = images.to(self.device)
        points = points or Points(tuple(images.shape[-2:]))
        with self.precision.autocast():
            encoding = self.encoder(gather_points(images, points), points)
        if self.config.model.stochastic_encoding:
            return encoding.mu.float(), encoding.logvar.float()
        return encoding.float(), None

    def encode(self, images: torch.Tensor, points: Points | None = None) -> torch.Tensor:
        """Latents (B, D) of images (B, C, H, W), by default of every pixel; of a stochastic encoder the mean."""
        return self.encode_distribution(images, points)[0]

    @torch.no_grad()
    def encode_stochastic(
        self,
        images: torch.Tensor,
        latents: torch.Tensor | None = None,
        steps: str = "100",
        *,
        stop: int | None = None,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """The noise (B, C, H, W), mollified, from which DDIM with the same `steps` returns the images.

        Args:
            images: (B, C, H, W).
            latents: (B, D); those of the images by default.
            steps: step subset of the inversion.
            stop: the step of the subset whose state is returned, by default the last.
            callback: called as callback(i, t, x, denoised) after each step.
        """
        images = images.to(self.device)
        latents = self.encode(images) if latents is None else latents
        process = self.process.respaced(steps)
        denoise = self.denoiser_at(latents, tuple(images.shape[-2:]), steps, clip=False)
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
            options: sampler and steps.
            step_noise: returns mollified noise for the steps of a stochastic sampler.
            start: the step of the subset at which `noise` is the state, by default the last.
            guide, correct: wrap the denoiser, and correct each state (see `diffusion.conditioning`).
            deblur: undo the mollifier, see `sharpened`; else the mollified images are returned.
            callback: called as callback(i, t, x, denoised) after each step.
        Returns:
            (B, C, H, W), float32, about [−1, 1].
        """
        options = options or SamplingOptions()
        self.inverse_snr(options.inv_snr)  # what is missing must not wait for the last step
        process = self.process.respaced(options.steps)
        denoise = self.denoiser_at(latents, tuple(noise.shape[-2:]), options.steps, options.clip)
        denoise = denoise if guide is None else guide(denoise)
        last = LastEstimate(callback)
        hooks = {"start": start, "correct": correct, "callback": last}
        if options.sampler == "ddpm":
            x = ancestral(denoise, noise, process, step_noise, **hooks)
        elif options.sampler == "dpmpp":
            x = dpmpp(denoise, noise, process, **hooks)
        else:
            x = ddim(denoise, noise, process, eta=options.eta, noise=step_noise, **hooks)
        return self.sharpened(x, last.denoised, options.inv_snr) if deblur else x

    @torch.no_grad()
    def sample(
        self,
        seeds: Sequence[int],
        size: Size | None = None,
        options: SamplingOptions | None = None,
        *,
        latent_steps: str | None = None,
        deblur: bool = True,
        callback: Callback | None = None,
    ) -> torch.Tensor:
        """Images (B, C, H, W) drawn from the prior, each a function of its own seed alone.

        Args:
            seeds: one per image.
            size: (H, W); the training lattice by default.
            options: sampler and steps.
            latent_steps: step subset of the latent model; all steps by default.
        Raises:
            ValueError: when the model was loaded without a latent run.
        """
        if self.prior is None:
            raise ValueError("sampling needs the latent model of stage two: load the model with its latent run")
        size = size or self.config.size
        latents = self.prior.sample(seeds, latent_steps)
        noise = self.initial_noise(seeds, size)
        return self.decode(
            latents, noise, options, step_noise=self.step_noise(seeds, size), deblur=deblur, callback=callback
        )

    def initial_noise(self, seeds: Sequence[int], size: Size) -> torch.Tensor:
        """Mollified noise T ξ (B, C, H, W): for one seed the same function at every size."""
        return self._noise(seeds, size, Purpose.IMAGE)

    def step_noise(self, seeds: Sequence[int], size: Size) -> Callable[[], torch.Tensor]:
        """The source of mollified noise for stochastic samplers: a new draw per call, a function of the seeds."""
        calls = itertools.count()
        return lambda: self._noise(seeds, size, Purpose.IMAGE_STEP, next(calls))

    def _noise(self, seeds: Sequence[int], size: Size, purpose: Purpose, *indices: int) -> torch.Tensor:
        keys = [key(seed, purpose, *indices) for seed in seeds]
        return self.process.mollifier.noise(function_noise(keys, self.config.data.channels, size, self.device))

    def sharpened(self, x: torch.Tensor, last: Denoised, inv_snr: float | str = 0.05) -> torch.Tensor:
        """The images (B, C, H, W) that a sampler's result x stands for.

        Where the network predicts x_0, they are its last x̂_0, to which no filter W is applied:

            x̂_0 + W (x - T x̂_0).

        The difference is what a correction of the last state added, and zero without one. For other predictions they
        are W x.
        last: the estimates of the last step (see `LastEstimate`).
        """
        if last.sharp is None:
            return self.deblur(x, inv_snr)
        return last.sharp + self.deblur(x - last.x_0, inv_snr)

    def deblur(self, x: torch.Tensor, inv_snr: float | str = 0.05) -> torch.Tensor:
        """Undo the mollifier by the Wiener filter; inv_snr as in `SamplingOptions`.

        White-noise diffusion has nothing to undo; the truncated convolution has no inverse, so its images stay as
        they are.
        """
        ratio = self.inverse_snr(inv_snr)
        return self.process.mollifier.inverse(x, ratio) if self.process.mollifier.kind == "dct" else x

    def denoiser_at(self, latents: torch.Tensor, size: Size, steps: str, clip: bool = True) -> Denoiser:
        """The denoiser of samplers: states (B, C, H, W) and steps t (B,) of the respaced process to estimates.

        Gradients are computed where a state requires them, as in guidance, and else not, whatever the caller's mode.
        """
        points, latents = Points(size), latents.to(self.device)
        denoiser = cast_weights(self.denoiser, self.precision.dtype)

        def network(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            wanted = torch.is_grad_enabled() and x_t.requires_grad
            with torch.set_grad_enabled(wanted), self.precision.autocast():
                return points_to_image(denoiser(image_to_points(x_t), points, time, latents).float(), size)

        return self.process.respaced(steps).denoiser(network, clip)


_DEFAULT_STEPS = {"ddim": "100", "ddpm": "100", "dpmpp": "20"}
SAMPLERS = tuple(_DEFAULT_STEPS)
