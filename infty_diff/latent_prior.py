"""The trained latent model: draws latents by seed (stage two)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch

from configs.schema import LatentConfig
from diffusion.factory import build_latent_process
from diffusion.random import Purpose, key, normals
from diffusion.samplers import ancestral
from models.factory import build_latent_model, for_evaluation
from models.latent_mlp import MLPSkipNet
from runtime.weights import load_networks

_MODEL, STATISTICS = "latent_model", ("mean", "std")  # of the latents
_STEPS_AT_ONCE = 50  # whose noise is drawn together


class LatentPrior:
    """A latent DDPM and the statistics that its latents were normalised with.

    Args:
        config: configuration of stage two.
        model: the latent network, on the device to run on.
        mean, std: float64 (D,), of the encoder's latents.
    """

    def __init__(self, config: LatentConfig, model: MLPSkipNet, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.config, self.model = config, model.eval()
        self.process = build_latent_process(config)
        self.device = next(model.parameters()).device
        self.mean, self.std = mean.to(self.device), std.to(self.device)

    def to(self, device: torch.device) -> LatentPrior:
        """Move network and statistics, and return the prior."""
        self.model.to(device)
        self.device, self.mean, self.std = device, self.mean.to(device), self.std.to(device)
        return self

    @property
    def dim(self) -> int:
        """Size D of a latent."""
        return self.mean.shape[0]

    @classmethod
    def from_tensors(
        cls, config: LatentConfig, tensors: Mapping[str, torch.Tensor], device: torch.device, where: str = "weights"
    ) -> LatentPrior:
        """Rebuild the prior from the tensors of `to_tensors`; ValueError naming `where` when they are others."""
        sizes = {tuple(tensors[name].shape) if name in tensors else None for name in STATISTICS}
        dim = next(iter(sizes)) or ()
        if len(sizes) > 1 or len(dim) != 1:
            raise ValueError(f"{where}: its mean and std are no two vectors of a size; accepted: weights of stage two")
        model = build_latent_model(config.model, dim[0])
        load_networks({_MODEL: model}, {k: v for k, v in tensors.items() if k not in STATISTICS}, where)
        return cls(config, for_evaluation(model).to(device), *(tensors[name] for name in STATISTICS))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the inference file."""
        model = {f"{_MODEL}.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {**model, "mean": self.mean, "std": self.std}

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents of the encoder (B, D) to zero mean and unit deviation per dimension, float32."""
        return ((latents.double() - self.mean) / self.std).float()

    def unnormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise`."""
        return (latents.double() * self.std + self.mean).float()

    @torch.no_grad()
    def sample(self, seeds: Sequence[int], steps: str | None = None) -> torch.Tensor:
        """Latents (B, D), float32, by ancestral sampling; each depends on its own seed alone.

        Args:
            seeds: one per latent.
            steps: step subset; all steps by default.
        """
        process = self.process if steps is None else self.process.respaced(steps)
        noise = partial(next, self._noise(seeds))
        denoise = process.denoiser(self.model, clip=False)  # latents are unbounded
        return self.unnormalise(ancestral(denoise, noise(), process, noise=noise))

    def _noise(self, seeds: Sequence[int]) -> Iterator[torch.Tensor]:
        """Standard normal (B, D), one after the other, drawn for several steps at once."""
        for block in itertools.count():
            keys = [key(seed, Purpose.LATENT, block) for seed in seeds]
            yield from normals(keys, 1, (_STEPS_AT_ONCE, self.dim), self.device)[:, 0].unbind(1)
