"""Stage two: a diffusion prior on the latents of a trained encoder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from configs.schema import LatentConfig
from data.latents import LatentSet
from data.loader import index_batches
from diffusion.factory import build_objective, build_timesteps
from diffusion.random import Purpose, stream
from diffusion.samplers import LastEstimate
from diffusion.transfer import to_device
from infty_diff.latent_prior import LatentPrior
from infty_diff.model import InftyDiff, SamplingOptions
from models.factory import build_latent_model
from runtime.precision import Precision
from runtime.processes import ALONE, Processes
from training.parallel import stacked
from training.stage import WHOLE, Draws

_HELD_OUT_BATCH = 256  # part of what the held-out loss is: the batch size of training may change, its draws may not


class LatentStage:
    """Network, latents and loss of stage two, for the `Trainer`.

    Args:
        config: the stage's configuration.
        latents: encodings of the images and their mirror images.
        decoder: the stage-one model, for previews.
        precision: device and autocast type.
        processes: this process and those that train with it.
    """

    def __init__(
        self,
        config: LatentConfig,
        latents: LatentSet,
        decoder: InftyDiff,
        precision: Precision,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.decoder, self.device, self.processes = config, decoder, precision.device, processes
        self.model = build_latent_model(config.model, latents.dim).to(self.device)
        self.modules: dict[str, nn.Module] = {"latent_model": self.model}
        self.train_set, self.test_set = latents.split(config.data.test_ratio)
        self.examples = {"latents": self.train_set.count, "held out": self.test_set.count}
        self.fingerprint = latents.fingerprint()
        self.held_out, self.facts = "test_loss", {}
        self.held_out_count = self.test_set.count
        self.held_out_steps = config.train.calculate_test_loss_steps if self.held_out_count else 0
        self.mean, self.std = latents.mean, latents.std
        self.prior = self._prior(self.model)
        self.process = self.prior.process
        self.objective = build_objective(config.diffusion, self.process)
        gather = partial(stacked, processes=processes)
        self.timesteps = build_timesteps(config.diffusion, self.process, self.device, gather)

    def _prior(self, model: nn.Module) -> LatentPrior:
        return LatentPrior(self.config, model, self.mean, self.std)

    def batches(self, seen: int) -> Iterator[torch.Tensor]:
        """Yield the int64 numbers (B,) of this process's latents of every step after `seen` ones of all processes."""
        return index_batches(
            self.train_set.count,
            self.config.train.batch_size,
            seed=self.config.run.seed,
            seen=seen,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        )

    def draw(
        self, generator: torch.Generator, batch: int, rows: slice = WHOLE, numbers: torch.Tensor | None = None
    ) -> Draws:
        """Timesteps with their weights and noise of a batch of latents, of which `rows` are wanted.

        generator: on the device; of a stochastic encoder the draws of latents come from it too.
        """
        draws = self._draw_encodings(generator, batch)
        draws["t"], draws["weights"] = self.timesteps.sample(generator, batch, self.device)
        draws["noise"] = self._normals(generator, batch)
        return {name: numbers[rows] for name, numbers in draws.items()}

    def _draw_encodings(self, generator: torch.Generator, batch: int) -> Draws:
        return {} if self.train_set.logvar is None else {"encoding": self._normals(generator, batch)}

    def _normals(self, generator: torch.Generator, batch: int) -> torch.Tensor:
        return torch.randn(batch, self.train_set.dim, generator=generator, device=self.device)

    def loss(self, numbers: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """L1 (or MSE) between noise and its prediction on normalised latents.

        Args:
            numbers: int64 (B,), which latents.
            draws: theirs, of `draw`.
        """
        base, bound = self._per_latent(self.model, self.train_set, numbers, draws)
        return (draws["weights"] * (base + bound)).mean(), base.detach(), {}

    def learn(self, draws: Draws, losses: torch.Tensor) -> None:
        """Let the sampler of timesteps take note of the base losses (B,) of this process's latents of a step."""
        self.timesteps.update(draws["t"], losses)

    def _per_latent(
        self, model: nn.Module, latents: LatentSet, numbers: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The base loss of each latent, and the bound that trains a learned variance."""
        t, x_0 = draws["t"], self.prior.normalise(latents.draw(numbers, draws.get("encoding")).to(self.device))
        x_t, target = self.process.training_pair(x_0, t, draws["noise"])
        return self.objective(model(x_t, self.process.schedule.network_time(t)), target, x_0, t)

    @torch.no_grad()
    def held_out_loss(self, ema: dict[str, nn.Module]) -> float:
        """The mean base loss over held-out latents, every step of the process being equally likely."""
        numbers = torch.arange(self.test_set.count).repeat(self.config.train.test_loss_repeats)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, some in enumerate(numbers.split(_HELD_OUT_BATCH)):
            generator = stream(self.config.run.seed, Purpose.HELD_OUT_LATENTS, i, device=self.device)
            draws, steps = self._draw_encodings(generator, len(some)), self.process.schedule.num_steps
            draws["t"] = torch.randint(steps, (len(some),), generator=generator, device=self.device)
            draws["noise"] = self._normals(generator, len(some))
            base, _ = self._per_latent(ema["latent_model"], self.test_set, to_device(some, self.device), draws)
            total += base.double().sum()
        return total.item() / len(numbers)

    @torch.no_grad()
    def previews(self, ema: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Rows: mollified samples of both stages, and those deblurred."""
        seeds, size = range(self.config.train.sample_size), self.decoder.config.size
        latents = self._prior(ema["latent_model"]).sample(seeds)
        options = SamplingOptions(steps=self.config.train.plot_sampling_steps)
        last, noise = LastEstimate(), self.decoder.initial_noise(seeds, size)
        mollified = self.decoder.decode(latents, noise, options, deblur=False, callback=last)
        return {"mollified": mollified, "deblurred": self.decoder.sharpened(mollified, last.denoised)}

    def weights(self, ema: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """The EMA weights of the network and the latents' statistics, as `InftyDiff.from_runs` reads them."""
        return self._prior(ema["latent_model"]).to_tensors()

    def state_dict(self) -> dict[str, Any]:
        return {"timesteps": self.timesteps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.timesteps.state_dict() and state["timesteps"]:  # only one that learns has a state
            self.timesteps.load_state_dict(state["timesteps"])
