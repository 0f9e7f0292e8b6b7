"""Encodings of a data set: one safe file with float64 statistics, images and mirror images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data.base import digest
from data.splits import hashed_split


@dataclass(frozen=True)
class LatentSet:
    """Latents of N images and of their mirror images.

    mu: (N, V, D), float32; V = 2 views (image, mirror image) or 1. logvar: the same shape for a stochastic
    encoder, else None. mean, std: float64 (D,), over images and views. names: of the N images.
    """

    mu: torch.Tensor
    logvar: torch.Tensor | None
    mean: torch.Tensor
    std: torch.Tensor
    names: Sequence[str]

    @classmethod
    def create(
        cls, mu: torch.Tensor, logvar: torch.Tensor | None = None, names: Sequence[str] | None = None
    ) -> LatentSet:
        """Build the set and its statistics, computed in float64 over images and views; names default to numbers.

        Raises:
            ValueError: when a latent is not finite (the encoder diverged).
        """
        if not mu.isfinite().all():
            bad = (~mu.isfinite().flatten(1).all(dim=1)).nonzero()[0].item()
            raise ValueError(f"the encoding of image {bad} is not finite; the stage-one model has diverged")
        flat = mu.double().flatten(0, 1)  # (N·V, D)
        variance = flat.var(dim=0, unbiased=False)
        if logvar is not None:
            variance = variance + logvar.double().exp().flatten(0, 1).mean(dim=0)  # law of total variance
        # A dimension that the encoder never uses has no scale of its own; 1 leaves it at its mean.
        std = torch.where(variance > 0, variance.sqrt(), 1.0)
        return cls(mu, logvar, flat.mean(dim=0), std, names or [str(i) for i in range(len(mu))])

    def __len__(self) -> int:
        """Number of images N."""
        return self.mu.shape[0]

    @property
    def dim(self) -> int:
        """Size D of a latent."""
        return self.mu.shape[2]

    @property
    def count(self) -> int:
        """Number of latents N·V."""
        return self.mu.shape[0] * self.mu.shape[1]

    def fingerprint(self) -> str:
        """Hex digest of the latents and of the names of their images."""
        values = (hashlib.sha256(t.cpu().numpy().tobytes()).hexdigest() for t in self.to_tensors().values())
        return digest({"shape": list(self.mu.shape)}, [*values, *self.names])

    def split(self, part: float) -> tuple[LatentSet, LatentSet]:
        """The images to train on, and about a `part` of them held out by a hash of their names.

        An image and its mirror image stay together; statistics are shared. For few images, see `hashed_split`.
        """
        parts = hashed_split(self.names, part, "latents")  # images held out before must not decide
        return self._chosen(parts["train"]), self._chosen(parts["val"])

    def _chosen(self, images: list[int]) -> LatentSet:
        logvar = None if self.logvar is None else self.logvar[images]
        return LatentSet(self.mu[images], logvar, self.mean, self.std, [self.names[i] for i in images])

    def draw(self, numbers: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents (B, D) number `numbers` (int64 (B,), 0 … count − 1).

        noise: (B, D), standard normal; a stochastic encoder needs it, and then they are a fresh draw.
        """
        numbers = numbers.to(self.mu.device)
        mu = self.mu.flatten(0, 1)[numbers]
        if self.logvar is None:
            return mu
        assert noise is not None
        return mu + (self.logvar.flatten(0, 1)[numbers] / 2).exp() * noise.to(mu)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the cache file; the names are those of the data set."""
        tensors = {"mu": self.mu, "mean": self.mean, "std": self.std}
        return tensors if self.logvar is None else {**tensors, "logvar": self.logvar}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], names: Sequence[str]) -> LatentSet:
        """The inverse of `to_tensors`."""
        return cls(tensors["mu"], tensors.get("logvar"), tensors["mean"], tensors["std"], names)
