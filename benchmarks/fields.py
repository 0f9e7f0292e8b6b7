"""How well fields are drawn given stations, against kriging, and what unknown points cost.

    python benchmarks/fields.py --model=checkpoints/temperature --data=PATH --json=fields.json
    python benchmarks/fields.py --complete=checkpoints/heat --complete_latent=checkpoints/heat_sampler \\
        --half=checkpoints/half --half_latent=checkpoints/half_sampler --data=heat.npz --json=fields.json

Stations: held-out fields are measured at 3 % of their points, with errors of 1 % of the range of the data. Shown are,
at the other points,

    RMSE       of the mean, in the units of the data, of several channels in those of the model
    coverage   how often the truth is within an interval of 90 %

of `InftyDiff.posterior` and of two kinds of kriging, Gaussian fields with the mean map of the training fields. The
covariance of "stationary" is diagonal in cosines; that of "empirical" is that of the training fields. Of n draws, the
interval is from the k-th lowest to the k-th highest, which holds another draw with probability 1 - 2k / (n + 1). Of
kriging it is mean ± 1.645 sd.

Spectrum: the power of samples of a model whose fields were known in part, of one of the same fields known everywhere,
and of these fields, by frequency; 1 is the finest wave along an axis. The result of a second call with the same --json
is added to that of the first.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from configs.schema import DataConfig
from data.datasets import open_dataset
from diffusion.cosine import cosine_matrix, dct, on_rows
from diffusion.random import Purpose, stream
from diffusion.sensors import Sensors
from experiments.support.tables import aligned
from infty_diff import InftyDiff, SamplingOptions
from runtime.files import write_json

PART, ERROR, QUANTILE, OUTSIDE = 0.03, 0.01, 1.645, 0.1
BANDS = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)


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
    model: InftyDiff, train: torch.Tensor, held_out: torch.Tensor, seeds: int, steps: int, latents: str = "sensors"
) -> list[dict[str, Any]]:
    """The table of stations: fields (N, C, H, W) in the units of the model, of which points are not unknown."""
    (height, width), generator = train.shape[2:], stream(0, Purpose.BENCHMARK)
    own = train if model.units is None else model.units.undo(train)
    scale = torch.tensor((1.0,) * len(train[0]) if model.units is None else model.units.scale)
    deviation = ERROR * float(((own.amax((0, 2, 3)) - own.amin((0, 2, 3))) / scale).mean())
    krigings = {
        f"kriging, {kind}": [Kriging(train[:, c], kind == "stationary") for c in range(train.shape[1])]
        for kind in ("stationary", "empirical")
    }
    errors: dict[str, list[torch.Tensor]] = {"posterior": [], **{name: [] for name in krigings}}
    inside: dict[str, list[torch.Tensor]] = {name: [] for name in errors}
    for truth in held_out:
        flat = truth.double().flatten(1)
        ids = torch.randperm(height * width, generator=generator)[: max(2, round(PART * height * width))]
        noisy = flat[:, ids] + deviation * torch.randn(flat[:, ids].shape, generator=generator, dtype=torch.float64)
        places = torch.stack([(ids // width + 0.5) / height, (ids % width + 0.5) / width], 1)
        sensors, options = Sensors(places, noisy.mT, deviation), SamplingOptions(str(steps))
        drawn = model.posterior(sensors, range(seeds), (height, width), options, sharp=True, latents=latents)
        found = {"posterior": _interval(drawn.double().cpu().flatten(2))}
        for name, channels in krigings.items():
            pairs = (one.given(ids, values, deviation) for one, values in zip(channels, noisy))
            mean, sd = map(torch.stack, zip(*pairs))
            found[name] = mean, mean - QUANTILE * sd, mean + QUANTILE * sd
        free = torch.ones(height * width, dtype=torch.bool)
        free[ids] = False
        for name, (mean, low, high) in found.items():
            errors[name].append((mean - flat)[:, free])
            inside[name].append(((low <= flat) & (flat <= high))[:, free].double())
    unit = float(scale[0]) if len(scale) == 1 else 1.0
    return [
        {"method": name, "rmse": unit * float(torch.cat(errors[name]).square().mean().sqrt()),
         "coverage": float(torch.cat(inside[name]).mean())} for name in errors
    ]  # fmt: skip


def _interval(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, low and high of draws (n, ...)."""
    k = max(1, round(OUTSIDE / 2 * (len(drawn) + 1)))
    ordered = drawn.sort(0).values
    return drawn.mean(0), ordered[k - 1], ordered[-k]


def spectrum_rows(power: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Powers (C, H, W) of the cosine coefficients of "partly", "complete" and "data", by band of frequency."""
    size = power["data"].shape[1:]
    k, l = (torch.arange(n, dtype=torch.float64) / n for n in size)  # noqa: E741 (of the formula)
    frequency = torch.hypot(k[:, None], l)
    rows = []
    for low, high in itertools.pairwise(BANDS):
        sums = {name: one[:, (low <= frequency) & (frequency < high)].sum(1) for name, one in power.items()}
        pairs = (("partly", "complete"), ("partly", "data"), ("complete", "data"))
        rows += [
            {"channel": c, "from": low, "to": high} | {f"{a}/{b}": float(sums[a][c] / sums[b][c]) for a, b in pairs}
            for c in range(len(power["data"]))
        ]
    return sorted(rows, key=lambda row: row["channel"])


def _power(fields: torch.Tensor) -> torch.Tensor:
    return on_rows(dct, dct(fields.double().cpu())).square().mean(0)


def _all(data: DataConfig, split: str, undo: bool = False) -> torch.Tensor:
    """The fields (N, C, H, W) of a split, in the units of the model, or with `undo` in those of the data."""
    fields = open_dataset(data, split)
    found = torch.stack([fields[i] for i in range(len(fields))])
    if found.isnan().any():
        raise ValueError("--data has unknown points; accepted: fields known everywhere")
    return fields.units.undo(found.double()) if undo else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run of fields, for the table of stations")
    parser.add_argument("--latents", default="sensors", help="of --model given stations, see InftyDiff.posterior")
    parser.add_argument("--data", help="file or folder of fields known everywhere; default: as trained")
    parser.add_argument("--fields", type=int, default=8, help="held-out fields")
    parser.add_argument("--seeds", type=int, default=19, help="samples of each")
    parser.add_argument("--steps", type=int, default=25, help="steps of the sampler")
    parser.add_argument("--half", help="run of fields known in part, for the table of spectra")
    parser.add_argument("--half_latent", help="its latent run")
    parser.add_argument("--complete", help="run of the same fields with all points known")
    parser.add_argument("--complete_latent", help="its latent run")
    parser.add_argument("--samples", type=int, default=256, help="of each of these models, of the same seeds")
    parser.add_argument("--json", type=Path, help="file for the result; default: none, the table alone")
    given = parser.parse_args()
    result = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    if given.model:
        model = InftyDiff.from_runs(given.model, device="cpu")
        data = replace(model.config.data, root_dir=given.data or model.config.data.root_dir)
        train, held_out = _all(data, "train"), _all(data, "val")[: given.fields]
        rows = station_rows(model, train, held_out, given.seeds, given.steps, given.latents)
        result["stations"] = {"fields": len(held_out), "seeds": given.seeds, "steps": given.steps, "rows": rows}
    if given.complete:
        power = {}
        for name in ("half", "complete"):
            model = InftyDiff.from_runs(getattr(given, name), getattr(given, f"{name}_latent"), "cpu")
            drawn = model.sample(range(given.samples), options=SamplingOptions(str(given.steps)), batch_size=32)
            power["partly" if name == "half" else name] = _power(model.units.undo(drawn))
        data = replace(model.config.data, root_dir=given.data or model.config.data.root_dir)
        power["data"] = _power(_all(data, "train", undo=True))
        result["spectrum"] = {"samples": given.samples, "steps": given.steps, "rows": spectrum_rows(power)}
    for name, table in result.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in table.items() if key != "rows"))
        lines = [tuple(table["rows"][0])]
        lines += [tuple(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()) for row in table["rows"]]
        print(aligned(lines))
    if given.json:
        write_json(given.json, result)


if __name__ == "__main__":
    main()
