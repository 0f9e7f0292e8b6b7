"""A few numbers of every schedule, mollifier, loss and sampler, made by our own code once it agreed with the parity
vectors.

`PYTHONPATH=. python tests/test_diffusion_regression.py` writes them anew, after a change that is meant to change them.
"""

from pathlib import Path

import torch

from diffusion import losses
from diffusion.mollifier import Mollifier
from diffusion.process import DiffusionProcess, Prediction, Variance
from diffusion.samplers import ancestral, ddim, ddim_invert
from diffusion.schedules import Schedule
from regression import compare, keep, waves

NUMBERS = Path(__file__).with_name("regression_diffusion.json")
TOLERANCE = 1e-5  # relative to the largest value, as for the parity vectors


def toy(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """A stand-in for a network, of one or (for learned variances) two sets of channels."""
    return 0.4 * x * torch.cos(time / 1000).view(-1, 1, 1, 1) + 0.1


def results() -> dict[str, torch.Tensor]:
    """Every number that is kept, by name."""
    found = {}
    for name in ("linear", "cosine", "shifted_cosine", "const0.008"):
        schedule = Schedule.create(name, 1000, resolution=256)
        for table in ("alpha_bar", "posterior_log_variance_clipped", "posterior_mean_coef1"):
            found[f"schedule/{name}/{table}"] = getattr(schedule, table)[::333]
        found[f"schedule/{name}/fixed_large_variance"] = schedule.fixed_large_log_variance.exp()[::333]
        found[f"schedule/{name}/respaced"] = schedule.respace("10,5").betas[::5]
    for size in ((16, 16), (24, 40)):
        x, white = waves(2, 3, *size, phase=0.3), waves(2, 3, *size, phase=1.1)
        for kind in ("dct", "conv"):
            mollifier = Mollifier(1.0, (16, 16), kind)
            found[f"mollifier/{kind}/{size}"] = mollifier.noise(white).flatten()[::777]
        found[f"wiener/{size}"] = Mollifier(1.0, (16, 16)).inverse(x).flatten()[::777]
        for prediction in Prediction:
            schedule = Schedule.create("cosine", 1000)
            process = DiffusionProcess(schedule, Mollifier(1.0, (16, 16)), prediction, Variance.FIXED_SMALL)
            x_t, target = process.training_pair(x, torch.tensor([30, 700]), white)
            found[f"loss/{prediction.value}/{size}"] = losses.mse(toy(x_t, torch.tensor([30.0, 700.0])), target)
            short = process.respaced([50, 250, 450, 650, 850])
            denoise = short.denoiser(toy, clip=True)
            start = process.mollifier.noise(white)

            def noise(process=process, x=x):
                return process.mollifier.noise(x)

            for name, drawn in (
                ("ancestral", ancestral(denoise, start, short, noise=noise)),
                ("ddim", ddim(denoise, start, short)),
                ("ddim_eta1", ddim(denoise, start, short, eta=1.0, noise=noise)),
                ("ddim_invert", ddim_invert(denoise, process.mollifier(x), short)),
            ):
                found[f"{name}/{prediction.value}/{size}"] = drawn.flatten()[::777]
    return found


def test_numbers_are_what_they_were():
    compare(NUMBERS, results(), TOLERANCE)


if __name__ == "__main__":
    keep(NUMBERS, results())
