"""How images are drawn from noise: the choices of a user."""

from __future__ import annotations

from dataclasses import dataclass

from diffusion.samplers import SAMPLERS


@dataclass(frozen=True)
class SamplingOptions:
    """How images are drawn from noise.

    steps: step subset, 100 or "100", "ddim50", "10,15,20" or "logsnr20"; by default, and where it is a mere number, as
    the sampler wants it. sampler: a name in `diffusion.samplers.SAMPLERS`. eta: noise of DDIM, in [0, 1].
    inv_snr: inverse signal-to-noise ratio of the Wiener filter that undoes the mollifier, where the network does not
    predict the image itself. clip: keep estimates of the clean image in [−1, 1]; without it DDIM inverts
    `encode_stochastic` exactly in the limit of many steps.
    """

    steps: str | int | None = None
    sampler: str = "ddim"
    eta: float = 0.0
    inv_snr: float = 0.05
    clip: bool = True

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {self.sampler!r}; accepted: {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[self.sampler]
        sampler.with_eta(self.eta)
        if self.inv_snr <= 0:
            raise ValueError(f"inv_snr is {self.inv_snr}; accepted: a number > 0")
        object.__setattr__(self, "steps", sampler.step_spec(self.steps))

    @property
    def draws_noise(self) -> bool:
        """Whether steps draw noise, so that images depend on more than latent and first state."""
        return SAMPLERS[self.sampler].draws_noise(self.eta)
