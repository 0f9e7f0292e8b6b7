"""The error of samplers on a Gaussian random field, for which the right answer is known.

    python benchmarks/sampler_error.py --json=benchmarks/results/sampler_error.json

The cosine coefficients of the field are independent, with variances c that fall as 1 / (1 + (k² + l²) / 2), like those
of photographs, and add up to a standard deviation of 0.5 per pixel. The optimal denoiser is then linear, and the
probability-flow ODE from x_T = T ξ to T x_0 multiplies a coefficient by √(c / (ᾱ_T c + 1 - ᾱ_T)), with ᾱ_T that of the
last step of the cosine schedule. A deterministic sampler multiplies it by another number. Two errors, computed from
both without drawing anything, in float64:

    map       √(E‖x̂ - x‖² / E‖x‖²), x and x̂ the images T x_0 that the ODE and the sampler make of the same T ξ
    variance  mean over the coefficients of |variance of x̂ / variance of x - 1|, the finest details counting as much
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from diffusion.mollifier import IDENTITY, Mollifier
from diffusion.process import Denoised, Denoiser, DiffusionProcess, Prediction
from diffusion.samplers import ddim, dpmpp
from diffusion.schedules import Schedule
from runtime.files import write_json

SIZE = (64, 64)
SIGMA = 1.0
RUNS = {
    "ddim": (ddim, ("10", "20", "50", "100", "200", "logsnr20", "logsnr100")),
    "dpmpp": (dpmpp, ("logsnr5", "logsnr10", "logsnr15", "logsnr20", "logsnr30", "logsnr50", "20", "100")),
}


def field_variances(size: tuple[int, int] = SIZE, deviation: float = 0.5) -> torch.Tensor:
    """Variances c of the cosine coefficients of the field, float64 (H, W), in units of white noise's."""
    k, l = (torch.arange(n, dtype=torch.float64) for n in size)  # noqa: E741 (the index of the formula)
    variances = 1 / (1 + 0.5 * (k[:, None] ** 2 + l**2))
    return variances * (deviation**2 * math.prod(size) / variances.sum())


def optimal_denoiser(process: DiffusionProcess, variances: torch.Tensor) -> Denoiser:
    """E[a | √ᾱ a + √(1 - ᾱ) ξ] for coefficients a of the given variances; the gain of T cancels."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        alpha_bar = process.schedule.at("alpha_bar", t, x)
        x_0 = alpha_bar.sqrt() * variances / (alpha_bar * variances + 1 - alpha_bar) * x
        eps = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return Denoised(x_0, eps, process.log_variance(None, t, x))

    return denoise


def sampler_errors(size: tuple[int, int] = SIZE) -> list[dict[str, Any]]:
    """One row per sampler and step subset: its number of network evaluations and its two errors."""
    # Every step is diagonal in the cosine basis: the states of the samplers here are vectors of coefficients, which
    # begin with one standard deviation of ξ each, so that they end with the factors of the map.
    process = DiffusionProcess(Schedule.create("cosine", 1000), IDENTITY, Prediction.MOLLIFIED_EPS)
    variances, gain = field_variances(size).flatten(), Mollifier(SIGMA, size).gain(size).flatten()
    last = process.schedule.alpha_bar[-1]
    exact = (variances / (last * variances + 1 - last)).sqrt()
    rows = []
    for name, (sampler, specs) in RUNS.items():
        for spec in specs:
            shorter = process.respaced(spec)
            factors = sampler(optimal_denoiser(shorter, variances), torch.ones_like(exact)[None], shorter)[0]
            error = (gain * (factors - exact)).norm() / (gain * exact).norm()
            variance = ((factors / exact) ** 2 - 1).abs().mean()
            rows.append({"sampler": name, "steps": spec, "evaluations": shorter.schedule.num_steps,
                         "map_error": float(error), "variance_error": float(variance)})  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [f"{'sampler':<9}{'steps':<12}{'evaluations':>11}{'map':>10}{'variance':>10}"]
    for row in rows:
        lines.append(f"{row['sampler']:<9}{row['steps']:<12}{row['evaluations']:>11}"
                     f"{row['map_error']:>10.4f}{row['variance_error']:>10.4f}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result; default: none, the table alone")
    arguments = parser.parse_args()
    rows = sampler_errors()
    if arguments.json:
        settings = {"size": list(SIZE), "sigma": SIGMA, "schedule": "cosine", "schedule_steps": 1000}
        write_json(arguments.json, {**settings, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
