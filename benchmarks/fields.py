"""How well fields are drawn given stations, against kriging, and what unknown points cost.

    python benchmarks/fields.py --model=checkpoints/temperature --data=PATH --fields=8 --seeds=16 --json=fields.json
    python benchmarks/fields.py --model=checkpoints/heat --latent=checkpoints/heat_sampler \\
        --complete=checkpoints/complete --complete_latent=checkpoints/complete_sampler

Held-out fields are measured at 3 % of their points, with errors of 1 % of the range. Shown are, at the other points,

    RMSE       of the mean, in the units of the data, and over channels of the half range
    coverage   how often the truth is within mean ± 1.645 sd, which should be 90 %

of `InftyDiff.posterior` and of two kinds of kriging, Gaussian fields with the mean map of the training fields. The
covariance of "stationary" is diagonal in cosines; that of "empirical" is that of the training fields.

With --complete, samples of both models are compared: the largest ratio of their power by frequency should be near 1.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.datasets import open_dataset
from diffusion.cosine import cosine_matrix, dct, on_rows
from diffusion.random import Purpose, stream
from diffusion.sensors import Sensors
from diffusion.spectrum import measure_spectrum
from experiments.support.tables import aligned
from infty_diff import InftyDiff, SamplingOptions
from runtime.files import write_json

PART, ERROR, QUANTILE = 0.03, 0.02, 1.645


class Kriging:
    """Gaussian fields (P,) with the mean of some fields (N, H, W), all known, and a covariance made of them."""

    def __init__(self, fields: torch.Tensor, stationary: bool) -> None:
        fields, size = fields.double(), fields.shape[1:]
        self.mean = fields.mean(0).flatten()
        apart = fields - fields.mean(0)
        if stationary:
            power = on_rows(dct, dct(apart)).square().mean(0).flatten()
            waves = torch.kron(*(cosine_matrix(n).double().mT for n in size))  # (P, P), columns are waves
            self.covariance = waves * power @ waves.mT
        else:
            self.covariance = apart.flatten(1).mT @ apart.flatten(1) / len(fields)

    def given(self, ids: torch.Tensor, values: torch.Tensor, sd: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation at all points, given values (M,) at some with errors of deviation sd."""
        cross = self.covariance[ids]
        weights = torch.linalg.solve(cross[:, ids] + sd**2 * torch.eye(len(ids), dtype=torch.float64), cross)
        mean = self.mean + (values.double() - self.mean[ids]) @ weights
        return mean, (self.covariance.diagonal() - (cross * weights).sum(0)).clamp(min=0).sqrt()


def station_rows(
    model: InftyDiff, train: torch.Tensor, held_out: torch.Tensor, seeds: int, steps: int
) -> list[dict[str, Any]]:
    """The table of stations: fields (N, C, H, W) in the units of the model, of which points are not unknown."""
    (height, width), generator = train.shape[2:], stream(0, Purpose.BENCHMARK)
    krigings = {
        f"kriging, {kind}": [Kriging(train[:, c], kind == "stationary") for c in range(train.shape[1])]
        for kind in ("stationary", "empirical")
    }
    errors: dict[str, list[torch.Tensor]] = {"posterior": [], **{name: [] for name in krigings}}
    inside: dict[str, list[torch.Tensor]] = {name: [] for name in errors}
    for truth in held_out:
        flat = truth.double().flatten(1)
        ids = torch.randperm(height * width, generator=generator)[: max(2, round(PART * height * width))]
        noisy = flat[:, ids] + ERROR * torch.randn(flat[:, ids].shape, generator=generator, dtype=torch.float64)
        places = torch.stack([(ids // width + 0.5) / height, (ids % width + 0.5) / width], 1)
        sensors, options = Sensors(places, noisy.mT, ERROR), SamplingOptions(str(steps))
        drawn = model.posterior(sensors, range(seeds), (height, width), options, sharp=True).double().cpu().flatten(2)
        found = {"posterior": (drawn.mean(0), drawn.std(0))}
        for name, channels in krigings.items():
            pairs = (one.given(ids, values, ERROR) for one, values in zip(channels, noisy))
            found[name] = tuple(map(torch.stack, zip(*pairs)))
        free = torch.ones(height * width, dtype=torch.bool)
        free[ids] = False
        for name, (mean, sd) in found.items():
            error = (mean - flat)[:, free]
            errors[name].append(error)
            inside[name].append((error.abs() <= QUANTILE * sd[:, free]).double())
    scale = model.units.scale[0] if model.units is not None and len(model.units.scale) == 1 else 1.0
    return [
        {"method": name, "rmse": scale * float(torch.cat(errors[name]).square().mean().sqrt()),
         "coverage": float(torch.cat(inside[name]).mean())} for name in errors
    ]  # fmt: skip


def power_ratio(model: InftyDiff, complete: InftyDiff, seeds: int, steps: int) -> dict[str, float]:
    """The ratio of the power of samples by frequency that is furthest from 1, and the mean, in units of the data."""
    powers = []
    for one in (model, complete):
        images = one.sample(range(seeds), options=SamplingOptions(str(steps))).double().cpu()
        images = images if one.units is None else one.units.undo(images)
        powers.append(torch.tensor(measure_spectrum([images - images.mean(0)], one.process.mollifier).values))
    ratios = powers[0] / powers[1]
    return {"furthest": float(ratios[(ratios.log().abs()).argmax()]), "mean": float(ratios.log().mean().exp())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="run of fields")
    parser.add_argument("--latent", help="its latent run, for --complete")
    parser.add_argument("--data", help="file or folder of its fields; default: as trained")
    parser.add_argument("--fields", type=int, default=8, help="held-out fields")
    parser.add_argument("--seeds", type=int, default=16, help="samples of each, and of each model for --complete")
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--complete", help="run of the same fields with all points known")
    parser.add_argument("--complete_latent", help="its latent run")
    parser.add_argument("--json", type=Path, help="file for the result; default: none, the table alone")
    given = parser.parse_args()
    model, result = InftyDiff.from_runs(given.model, given.latent, "cpu"), {}
    if given.complete:
        complete = InftyDiff.from_runs(given.complete, given.complete_latent, "cpu")
        result["power"] = power_ratio(model, complete, given.seeds, given.steps)
        print(" ".join(f"{name} {value:.3f}" for name, value in result["power"].items()))
    else:
        data = replace(model.config.data, root_dir=given.data or model.config.data.root_dir)
        sets = [open_dataset(data, split) for split in ("train", "val")]
        train, held_out = (torch.stack([s[i] for i in range(len(s))]) for s in sets)
        if train.isnan().any() or held_out.isnan().any():
            raise ValueError("--data has unknown points; accepted: fields known everywhere, for kriging")
        result["stations"] = station_rows(model, train, held_out[: given.fields], given.seeds, given.steps)
        lines = [("3 % stations", "RMSE", "coverage")]
        lines += [(r["method"], f"{r['rmse']:.4f}", f"{r['coverage']:.3f}") for r in result["stations"]]
        print(aligned(lines))
    if given.json:
        write_json(given.json, {**{k: v for k, v in vars(given).items() if k != "json"}, **result})


if __name__ == "__main__":
    main()
