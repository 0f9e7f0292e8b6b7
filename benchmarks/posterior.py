"""How well functions are drawn given measurements, where the answer is known.

    python benchmarks/posterior.py --json=benchmarks/results/posterior.json

Gaussian random fields of 64x64 (`benchmarks/sampler_error.py`) with the optimal denoiser, of which 3 % of the
pixels of T x_0 are measured with errors of 0.02. The posterior is kriging, computed by dense matrices. Samplers are 100
steps of DDIM, which are affine in x_T, or nearly, so that their mean is what they make of x_T = 0.

    mean     ‖mean - exact‖ / ‖exact‖
    sd       root mean variance of the samples over that of the exact posterior, at pixels that are not measured
    misfit   root mean square of what is measured on the samples minus the measurements

"posterior" is `diffusion.posterior`. "ΠGDM" (Song et al. 2023) takes r² I in place of H V Hᵗ, with r² the posterior
variance of a pixel if pixels were independent. "DPS" (Chung et al. 2023) takes a step ζ ∇‖y - H x̂‖ after each step of
the sampler. Both have the gradient of mollified states, T Tᵗ ∇. "prior" takes no notice of the measurements.

experiments/restoration.py measures what a trained model makes of images.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.sampler_error import field_variances
from diffusion.cosine import cosine_matrix, dct, idct, on_rows
from diffusion.mollifier import Mollifier
from diffusion.posterior import Measured
from diffusion.process import Denoised, Denoiser, DiffusionProcess, Prediction
from diffusion.random import Purpose, stream
from diffusion.samplers import Correction, ddim
from diffusion.schedules import Schedule
from diffusion.sensors import pixels
from experiments.support.tables import aligned
from runtime.files import write_json

PART, ERROR, DEVIATION = 0.03, 0.02, 0.5
ZETAS = (0.1, 0.3, 1.0)
Guide = Callable[[Denoiser], Denoiser]


class Field:
    """The field, its optimal denoiser, one draw of it measured at some pixels, and the exact posterior of T x_0."""

    def __init__(self, size: tuple[int, int], steps: str) -> None:
        generator = stream(0, Purpose.BENCHMARK, 0)
        schedule, self.size, count = Schedule.create("cosine", 1000), size, math.prod(size)
        self.process = DiffusionProcess(schedule, Mollifier(1.0, size), Prediction.MOLLIFIED_EPS).respaced(steps)
        self.c, gain = field_variances(size, DEVIATION), self.process.mollifier.gain(size)
        self.mask = torch.zeros(count, dtype=torch.bool)
        self.mask[torch.randperm(count, generator=generator)[: max(2, round(PART * count))]] = True
        truth = filtered(gain * self.c.sqrt(), torch.randn(size, dtype=torch.float64, generator=generator)).flatten()
        self.y = truth[self.mask] + ERROR * torch.randn(int(self.mask.sum()), dtype=torch.float64, generator=generator)
        units = torch.eye(count, dtype=torch.float64)[self.mask].reshape(-1, *size)
        cross = filtered(gain**2 * self.c, units).flatten(1)
        weights = torch.linalg.solve(cross[:, self.mask] + ERROR**2 * torch.eye(len(self.y)), cross)
        rows, cols = (cosine_matrix(n).square() for n in size)
        prior = (rows.mT @ (gain**2 * self.c) @ cols).flatten()
        self.mean, self.variance = self.y @ weights, prior - (cross * weights).sum(0)

    def observe(self, images: torch.Tensor) -> torch.Tensor:
        return pixels(self.mask.reshape(self.size))(images)

    def denoise(self, x: torch.Tensor, t: torch.Tensor) -> Denoised:
        alpha_bar = self.process.schedule.at("alpha_bar", t, x)
        smooth = filtered(alpha_bar.sqrt() * self.c.to(x) / (alpha_bar * self.c.to(x) + 1 - alpha_bar), x)
        noise = (x - alpha_bar.sqrt() * smooth) / (1 - alpha_bar).sqrt()
        return Denoised(smooth, noise, self.process.log_variance(None, t, x))

    def row(self, method: str, count: int, guide: Guide | None, correct: Correction | None = None) -> dict[str, Any]:
        """The errors of a method from `count` samples."""
        states = torch.randn(count + 1, 1, *self.size, generator=stream(0, Purpose.BENCHMARK, 1))
        states[0] = 0
        denoise = guide(self.denoise) if guide else self.denoise
        drawn = ddim(denoise, self.process.mollifier.noise(states), self.process, correct=correct)
        found, free = drawn.double().flatten(1), ~self.mask
        spread = (found[1:] - found[0])[:, free].square().mean()
        return {
            "method": method,
            "mean_error": float((found[0] - self.mean).norm() / self.mean.norm()),
            "sd_ratio": float((spread / self.variance[free].mean()).sqrt()),
            "misfit": float((found[1:, self.mask] - self.y).square().mean().sqrt()),
        }

    def with_gradient(self, weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], denoise: Denoiser) -> Denoiser:
        """The estimate plus (s² b² / a) T Tᵗ Jᵗ Hᵗ w, with weights w that `weigh` makes of (t, y - H x̂)."""

        def guided(x: torch.Tensor, t: torch.Tensor) -> Denoised:
            schedule, mollifier = self.process.schedule, self.process.mollifier
            a, b = (schedule.at(name, t, x) for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"))
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                denoised = denoise(x, t)
                seen = self.observe(denoised.smooth)
                (gradient,) = torch.autograd.grad(seen, x, weigh(t, self.y.to(x) - seen.detach()))
            smooth = denoised.smooth.detach() + b**2 / a * mollifier(mollifier(gradient))
            return Denoised(smooth, (x.detach() - a * smooth) / b, denoised.log_variance)

        return guided

    def pigdm(self, denoise: Denoiser) -> Denoiser:
        def weigh(t: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
            alpha_bar = self.process.schedule.at("alpha_bar", t, missed)
            independent = (1 - alpha_bar) * DEVIATION**2 / (alpha_bar * DEVIATION**2 + 1 - alpha_bar)
            return missed / (independent + ERROR**2)

        return self.with_gradient(weigh, denoise)

    def dps(self, zeta: float) -> Correction:
        """x_{t-1} + ζ T Tᵗ Jᵗ Hᵗ (y - H x̂) / ‖y - H x̂‖; the optimal J is symmetric and depends on t alone."""

        def correct(x: torch.Tensor, step: int, denoised: Denoised) -> torch.Tensor:
            missed = self.y.to(x) - self.observe(denoised.smooth)
            spread = torch.zeros_like(x).flatten(1)
            spread[:, self.mask] = missed / missed.norm(dim=1, keepdim=True)
            t = torch.full((len(x),), step)
            gradient = self.denoise(spread.reshape(x.shape), t).smooth
            return x + zeta * self.process.mollifier(self.process.mollifier(gradient))

        return correct


def filtered(factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Images with their cosine coefficients times a factor."""
    return on_rows(idct, idct(on_rows(dct, dct(x)) * factor))


def gaussian_rows(size: tuple[int, int] = (64, 64), count: int = 24, steps: str = "100") -> list[dict[str, Any]]:
    """A row for each method."""
    field = Field(size, steps)
    measured = Measured(field.observe, field.y, torch.full_like(field.y, ERROR**2), field.process)
    rows = [field.row("posterior", count, measured.posterior), field.row("ΠGDM", count, field.pigdm)]
    rows += [field.row(f"DPS, ζ {zeta:g}", count, None, field.dps(zeta)) for zeta in ZETAS]
    return [*rows, field.row("prior", count, None)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [("Gaussian field", "mean", "sd", "misfit")]
    lines += [(r["method"], *(f"{r[name]:.4f}" for name in ("mean_error", "sd_ratio", "misfit"))) for r in rows]
    return aligned(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result; default: none, the table alone")
    arguments, rows = parser.parse_args(), gaussian_rows()
    if arguments.json:
        write_json(arguments.json, {"gaussian": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
