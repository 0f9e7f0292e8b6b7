"""How images are drawn from noise: the choices of a user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.samplers import SAMPLERS
from infty_diff.filter_file import parse_inv_snr
from runtime.stored import read_header


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn from noise.

    steps: step subset, 100 or "100", "ddim50", "10,15,20" or "logsnr20"; by default, and where it is a mere number, as
    the sampler wants it. sampler: a name in `diffusion.samplers.SAMPLERS`. eta: noise of DDIM, in [0, 1].
    inv_snr: inverse signal-to-noise ratio of the Wiener filter that undoes the mollifier, where the network does not
    predict the image itself: a number or its text, or "calibrated" for what is stored with the weights. clip: keep
    estimates of the clean image in [−1, 1]; without it DDIM inverts `encode_stochastic` exactly in the limit of many
    steps.
    """

    steps: str | int | None = None
    sampler: str = "ddim"
    eta: float = 0.0
    inv_snr: float | str = 0.05
    clip: bool = True

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; accepted: {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[self.sampler]
        sampler.with_eta(self.eta)
        object.__setattr__(self, "inv_snr", parse_inv_snr(self.inv_snr))
        object.__setattr__(self, "steps", sampler.step_spec(self.steps))

    @property
    def draws_noise(self) -> bool:
        """Whether steps draw noise, so that images depend on more than latent and first state."""
        return SAMPLERS[self.sampler].draws_noise(self.eta)


def stored_sampling(file: Path, header: Mapping[str, Any] | None = None) -> SamplingOptions:
    """The options that a file of weights was saved with; header: its own, if it was read already.

    Raises:
        ValueError: when they are not options of this version, or the file cannot be read.
    """
    stored = (read_header(file) if header is None else header).get("sampling", {})
    try:
        return SamplingOptions(**stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: holds sampling options this version refuses: {error}") from None
