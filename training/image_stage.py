"""Stage one: the diffusion autoencoder of functions, trained on random subsets of each image's pixels."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from configs.schema import ImageConfig
from data.base import ImageDataset
from data.completed import completed_sets
from data.loader import batches, sequential
from data.pixels import as_values
from diffusion import losses
from diffusion.coordinates import CONVENTIONS, Points, Size, gather_points, size_of
from diffusion.factory import build_image_process, build_objective, build_timesteps
from diffusion.random import Purpose, stream
from diffusion.samplers import LastEstimate
from diffusion.subsets import draw_points
from diffusion.transfer import to_device
from infty_diff.cast_weights import cast_weights
from infty_diff.growing import spectrum_facts, spectrum_of
from infty_diff.model import InftyDiff, SamplingOptions
from models.factory import build_denoiser, build_encoder
from models.interpolation import interpolate_to_grid
from runtime.precision import Precision
from runtime.processes import ALONE, Processes
from runtime.stored import BEST_WEIGHTS
from training.parallel import stacked
from training.stage import WHOLE, Draws

log = logging.getLogger(__name__)
_HELD_OUT_BATCH = 16  # part of what the held-out loss is: the batch size of training may change, its draws may not


class ImageStage:
    """Networks, data and loss of stage one, for the `Trainer`.

    Args:
        config: the stage's configuration.
        train_set: images.
        val_set: held-out images, of which previews show the first and the held-out loss is computed. Without any,
            previews show images of `train_set` and there is no held-out loss.
        precision: device and autocast type.
        processes: this process and those that train with it.
    """

    def __init__(
        self,
        config: ImageConfig,
        train_set: ImageDataset,
        val_set: ImageDataset | None,
        precision: Precision,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.train_set, self.precision, self.processes = config, train_set, precision, processes
        self.device = precision.device
        self.process = build_image_process(config)
        self.objective = build_objective(config.diffusion, self.process)
        self.modules: dict[str, nn.Module] = {
            "denoiser": build_denoiser(config.model, config.data.channels, config.size).to(self.device),
            "encoder": build_encoder(config.model, config.data.channels, config.size).to(self.device),
        }
        gather = partial(stacked, processes=processes)
        self.timesteps = build_timesteps(config.diffusion, self.process, self.device, gather)
        self.val_set, self.held_out = val_set, "val_loss"
        self.examples = {"images": len(train_set), "held out": 0 if val_set is None else len(val_set)}
        self.held_out_count = 0 if val_set is None else min(len(val_set), config.train.val_images)
        self.fingerprint = train_set.fingerprint()
        self.held_out_steps = 0 if val_set is None else config.train.val_loss_steps
        if val_set is None and config.train.val_loss_steps:
            log.info("no images are held out (data.val_ratio=0): no val_loss, no %s", BEST_WEIGHTS)
        # Known beforehand, so that no step waits for a device.
        sets = [some for some in (train_set, val_set) if some is not None]
        self.units = getattr(train_set, "units", None)  # of fields
        self.partly_known = any(getattr(some, "partly_known", False) for some in sets)
        self.skips_unknown = self.partly_known and config.data.unknown == "skip"
        wanted = config.size, config.train.sample_size
        shown = _of_size(val_set or train_set, *wanted) or _of_size(train_set, *wanted)
        self.shown = as_values(torch.stack([shown[i % len(shown)] for i in range(config.train.sample_size)]))

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts = spectrum_facts(partial(spectrum_of, self.train_set, self.process.mollifier))
        return facts if self.units is None else {**facts, "units": asdict(self.units)}

    @cached_property
    def _read(self) -> list[Any]:
        """The sets as they are read: fields known in part are completed, for T needs all points."""
        sets = [some for some in (self.train_set, self.val_set) if some is not None]
        return completed_sets(sets, self.config.run.seed, self.skips_unknown) if self.partly_known else sets

    def batches(self, seen: int) -> Iterator[torch.Tensor]:
        """Yield this process's images (B, C, H, W), uint8 or fields, of every step after `seen` of all processes.

        Where points are skipped, fields are pairs (B, 2C, H, W), see `CompletedFields`.
        """
        data, seed = self.config.data, self.config.run.seed
        return batches(
            self._read[0],
            self.config.train.batch_size,
            seed=seed,
            seen=seen,
            flip=data.random_flip,
            num_workers=data.num_workers,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            pin_memory=self.device.type == "cuda",
        )

    def draw(
        self, generator: torch.Generator, batch: int, rows: slice = WHOLE, images: torch.Tensor | None = None
    ) -> Draws:
        """Timesteps with their weights, noise and points of a batch of images, of which `rows` are wanted.

        generator: on the device. images: the rows wanted; by default of the training size, and known everywhere.
        """
        t, weights = self.timesteps.sample(generator, batch, self.device)
        return {"t": t[rows], "weights": weights[rows], **self._draw_beside_t(generator, batch, rows, images)}

    def _draw_beside_t(
        self, generator: torch.Generator, batch: int, rows: slice = WHOLE, images: torch.Tensor | None = None
    ) -> Draws:
        def normals(*shape: int) -> torch.Tensor:
            return torch.randn(batch, *shape, generator=generator, device=self.device)[rows]

        data, model, mc = self.config.data, self.config.model, self.config.mc_integral
        size = self.config.size if images is None else size_of(images)
        known = images[:, : data.channels].isfinite().all(1) if self.skips_unknown and images is not None else None
        draws = {"white": normals(data.channels, *size)}
        count = self._count(size)
        if known is not None or count < math.prod(size):  # else all points are seen
            for name in ("seen", "encoded"):
                points = draw_points(mc.type, generator, batch, size, count, self.device, rows, known)
                draws[name] = points.index
        if model.stochastic_encoding:
            draws["encoding"] = normals(model.z_dim)
        return draws

    def _count(self, size: Size) -> int:
        """As many points as mc_integral says, in proportion at other sizes than that of training.

        Where fewer are known, as many as the field of this size has that has the fewest: not those of a batch, lest
        processes and parts of batches change the result.
        """
        count, own = self.config.mc_integral.q_sample, self.config.size
        if size != own:
            count = max(self.config.model.knn_neighbours, count * math.prod(size) // math.prod(own))
        sets = [self.train_set, self.val_set] if self.skips_unknown else []
        return min([count, *(getattr(some, "least_known", {}).get(size, count) for some in sets)])

    def loss(self, images: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Eq. (46) on random coordinates, eq. (10): ‖f(x_t(c), t, z) − T ξ(c)‖², z from other coordinates of x_0.

        Args:
            images: as of `batches`.
            draws: theirs, of `draw`.
        """
        base, bound, kld = self._per_image(self.modules, as_values(images), draws)
        loss = (draws["weights"] * (base + bound)).mean() + self.config.model.kld_weight * kld.mean()
        scalars = {}
        if self.config.model.learn_sigma:
            scalars["bound"] = bound.detach().mean()
        if self.config.model.stochastic_encoding:
            scalars["kld"] = kld.detach().mean()
        return loss, base.detach(), scalars

    def learn(self, draws: Draws, losses: torch.Tensor) -> None:
        """Let the sampler of timesteps take note of the base losses (B,) of this process's images of a step."""
        self.timesteps.update(draws["t"], losses)

    def _per_image(
        self, modules: dict[str, nn.Module], x_0: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each image (B,): the base loss, the bound that trains a learned variance, and the KL term of a stochastic
        encoder, zero where there is none."""
        t, size = draws["t"], size_of(x_0)
        if self.skips_unknown:
            x_0 = x_0[:, self.config.data.channels :]
        x_t, target = self.process.training_pair(x_0, t, draws["white"])
        seen, encoded = (Points(size, draws.get(name)) for name in ("seen", "encoded"))

        encode, kld = modules["encoder"], x_0.new_zeros(len(x_0))
        if self.config.model.stochastic_encoding:
            encoding = encode(gather_points(x_0, encoded), encoded, draws["encoding"])
            z, kld = encoding.z, losses.kl_standard_normal(encoding.mu.float(), encoding.logvar.float())
        else:
            z = encode(gather_points(x_0, encoded), encoded)
        output = modules["denoiser"](gather_points(x_t, seen), seen, self.process.schedule.network_time(t), z)
        target, x_0 = gather_points(target, seen), gather_points(x_0, seen)
        base, bound = self.objective(output, target, x_0, t, axis=2, loss=partial(self._base_loss, points=seen))
        return base, bound, kld

    @torch.no_grad()
    def held_out_loss(self, ema: dict[str, nn.Module]) -> float:
        """The mean of `loss` over held-out images, every step of the process being equally likely."""
        count = self.held_out_count
        ema = {name: cast_weights(module, self.precision.dtype) for name, module in ema.items()}
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        workers = self.config.data.num_workers
        chosen = sequential(self._read[-1], _HELD_OUT_BATCH, num_workers=workers, indices=range(count))
        for i, images in enumerate(chosen):
            generator = stream(self.config.run.seed, Purpose.HELD_OUT_IMAGES, i, device=self.device)
            x_0 = as_values(to_device(images, self.device))
            t = torch.randint(self.process.schedule.num_steps, (len(x_0),), generator=generator, device=self.device)
            draws = {"t": t, **self._draw_beside_t(generator, len(x_0), images=x_0)}
            with self.precision.autocast():
                base, bound, kld = self._per_image(ema, x_0, draws)
            total += (base + bound + self.config.model.kld_weight * kld).double().sum()
        return total.item() / count

    def _base_loss(self, prediction: torch.Tensor, target: torch.Tensor, points: Points) -> torch.Tensor:
        diffusion, model = self.config.diffusion, self.config.model
        base = losses.LOSSES[diffusion.loss_type]
        if not diffusion.multiscale_loss:
            return base(prediction, target)
        side, convention = diffusion.multiscale_max_img_size, CONVENTIONS[model.coordinate_convention]

        def to_grid(values: torch.Tensor) -> torch.Tensor:
            plain = self.modules["denoiser"].backend.plain
            return interpolate_to_grid(values, points, (side, side), model.knn_neighbours, convention, plain)

        return losses.multiscale(base, prediction, target, to_grid, side, max(points.size))

    @torch.no_grad()
    def previews(self, ema: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Rows: images, their mollified reconstructions, and those deblurred."""
        model = InftyDiff(self.config, ema["encoder"], ema["denoiser"], precision=self.precision, units=self.units)
        images = self.shown.to(self.device)
        noise = model.initial_noise(range(len(images)), self.config.size)
        options = SamplingOptions(steps=self.config.train.plot_sampling_steps)
        last = LastEstimate()
        mollified = model.decode(model.encode(images), noise, options, deblur=False, callback=last)
        deblurred = model.sharpened(mollified, last.denoised)
        rows = {"images": images, "mollified": mollified, "deblurred": deblurred}
        return {name: row.flip(2) for name, row in rows.items()} if self.config.data.origin == "lower" else rows

    def weights(self, ema: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """The EMA weights of both networks, as `InftyDiff.from_runs` reads them."""
        return {f"{name}.{key}": tensor for name, module in ema.items() for key, tensor in module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"timesteps": self.timesteps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.timesteps.state_dict() and state["timesteps"]:  # only one that learns has a state
            self.timesteps.load_state_dict(state["timesteps"])


def _of_size(data: ImageDataset, size: Size, most: int) -> list[torch.Tensor]:
    """The first items of a size."""
    groups = getattr(data, "groups", [range(len(data))])
    of_size = next((group for group in groups if size_of(data[group[0]]) == tuple(size)), [])
    return [data[i] for i in of_size[:most]]
