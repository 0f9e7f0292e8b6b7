"""How well fields are drawn given stations, against kriging, and what unknown points cost.

    python benchmarks/fields.py --model=checkpoints/temperature --data=PATH --json=fields.json
    python benchmarks/fields.py --complete=checkpoints/heat --complete_latent=checkpoints/heat_sampler \\
        --half=checkpoints/half --half_latent=checkpoints/half_sampler --data=FOLDER/heat.npz --json=fields.json

Stations: held-out fields are measured at 3 % of their points, with errors of 1 % of the range of the data. Shown are,
at the other points,

    RMSE       of the mean, in the units of the data, of several channels in those of the model
    coverage   how often the truth is within an interval of 90 %

of `InftyDiff.posterior` and of two kinds of kriging, Gaussian fields with the mean map of the training fields. The
covariance of "stationary" is diagonal in cosines; that of "empirical" is that of the training fields. Of n draws, the
interval is from the k-th lowest to the k-th highest, which holds another draw with probability 1 - 2k / (n + 1). Of
kriging it is mean ± 1.645 sd.

--picture shows the first of these fields, with its stations in grey, as its difference from the middle of the range, or
with data.anomalies from the mean map.

Spectrum: ratios of power by frequency, of which 1 is the finest wave along an axis, and the share that a band has of
the power of its channel. "data" are fields known everywhere, "smooth" and "completed" the same, known in part, with
smooth surfaces and with draws in the holes. "complete" and "partly" are samples of the models trained on these data.

The result of a second call with the same --json is added to that of the first.
"""

import argparse
import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from configs.schema import DataConfig
from data.datasets import open_dataset
from data.field_pictures import field_picture
from data.units import FieldUnits
from diffusion.completion import completed, measure_moments
from diffusion.conditioning import fill_unknown
from diffusion.coordinates import Size, size_of
from diffusion.cosine import cosine_matrix, dct, on_rows
from diffusion.random import Purpose, stream
from diffusion.sensors import Sensors
from experiments.support.tables import aligned
from infty_diff import InftyDiff, SamplingOptions
from runtime.files import write_json

PART, ERROR, QUANTILE, OUTSIDE = 0.03, 0.01, 1.645, 0.1
FILLED = 256  # fields whose holes are filled
RATIOS = (("smooth", "data"), ("completed", "data"), ("complete", "data"), ("partly", "data"), ("partly", "complete"))
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


@dataclass(frozen=True)
class Estimates:
    """What is said of a field (C, P) by its stations, the points `ids`: by method mean, sd, low and high; a draw."""

    truth: torch.Tensor
    ids: torch.Tensor
    found: dict[str, tuple[torch.Tensor, ...]]
    draw: torch.Tensor


def estimates(
    model: InftyDiff, train: torch.Tensor, held_out: torch.Tensor, seeds: int, steps: int, latents: str = "sensors"
) -> list[Estimates]:
    """Of held-out fields (N, C, H, W), in the units of the model, all known."""
    (height, width), generator = train.shape[2:], stream(0, Purpose.BENCHMARK)
    own = train if model.units is None else model.units.undo(train)
    deviation = ERROR * float(((own.amax((0, 2, 3)) - own.amin((0, 2, 3))) / _scale(model)).mean())
    krigings = {
        f"kriging, {kind}": [Kriging(train[:, c], kind == "stationary") for c in range(train.shape[1])]
        for kind in ("stationary", "empirical")
    }
    results = []
    for field in held_out:
        truth = field.double().flatten(1)
        ids = torch.randperm(height * width, generator=generator)[: max(2, round(PART * height * width))]
        noisy = truth[:, ids] + deviation * torch.randn(truth[:, ids].shape, generator=generator, dtype=torch.float64)
        places = torch.stack([(ids // width + 0.5) / height, (ids % width + 0.5) / width], 1)
        sensors, options = Sensors(places, noisy.mT, deviation), SamplingOptions(str(steps))
        drawn = model.posterior(sensors, range(seeds), (height, width), options, sharp=True, latents=latents)
        drawn, k = drawn.double().cpu().flatten(2), max(1, round(OUTSIDE / 2 * (seeds + 1)))
        ordered = drawn.sort(0).values
        found: dict[str, tuple[torch.Tensor, ...]] = {
            "posterior": (drawn.mean(0), drawn.std(0), ordered[k - 1], ordered[-k])
        }
        for name, channels in krigings.items():
            pairs = (one.given(ids, values, deviation) for one, values in zip(channels, noisy))
            mean, sd = map(torch.stack, zip(*pairs))
            found[name] = mean, sd, mean - QUANTILE * sd, mean + QUANTILE * sd
        results.append(Estimates(truth, ids, found, drawn[0]))
    return results


def _scale(model: InftyDiff) -> torch.Tensor:
    return torch.tensor([1.0] * model.channels if model.units is None else model.units.scale)


def station_rows(results: list[Estimates], unit: float) -> list[dict[str, Any]]:
    """The table of stations; unit: of RMSE."""
    rows = []
    for name in results[0].found:
        errors, inside = [], []
        for one in results:
            free = torch.ones(one.truth.shape[1], dtype=torch.bool)
            free[one.ids] = False
            mean, _, low, high = (part[:, free] for part in one.found[name])
            truth = one.truth[:, free]
            errors.append(mean - truth)
            inside.append(((low <= truth) & (truth <= high)).double())
        rmse = unit * float(torch.cat(errors).square().mean().sqrt())
        rows.append({"method": name, "rmse": rmse, "coverage": float(torch.cat(inside).mean())})
    return rows


def station_picture(one: Estimates, size: Size, unit: float, origin: str) -> torch.Tensor:
    """A picture, uint8 (3, h, w), of the first channel."""
    seen = one.truth[0].clone()
    seen[one.ids] = torch.nan
    drawn, kriged = (one.found[name] for name in ("posterior", "kriging, stationary"))
    rows = (
        {"truth, stations grey": seen, "mean of draws": drawn[0][0], "mean by kriging": kriged[0][0]},
        {"a draw": one.draw[0], "sd of draws": drawn[1][0], "sd by kriging": kriged[1][0]},
    )
    shown = torch.stack([one.truth[0], drawn[0][0], kriged[0][0], one.draw[0]]) * unit
    ends, most_sd = (float(shown.min()), float(shown.max())), unit * float(torch.cat([drawn[1], kriged[1]]).max())
    pictures = []
    for row in rows:
        maps = unit * torch.stack(list(row.values())).unflatten(1, size)
        units = FieldUnits((0.0,) * 3, (1.0,) * 3, tuple(row))
        limits = [(0.0, most_sd) if "sd" in name else ends for name in row]
        pictures.append(field_picture(maps, units, limits, origin))
    return torch.cat(pictures, 1)


def spectrum_rows(power: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Ratios of powers (C, H, W) of cosine coefficients by band of frequency: `power` has those that `RATIOS` names."""
    size = power["data"].shape[1:]
    k, l = (torch.arange(n, dtype=torch.float64) / n for n in size)  # noqa: E741 (of the formula)
    frequency = torch.hypot(k[:, None], l)
    rows = []
    for low, high in itertools.pairwise(BANDS):
        sums = {name: one[:, (low <= frequency) & (frequency < high)].sum(1) for name, one in power.items()}
        share = sums["data"] / power["data"].sum((1, 2))
        rows += [
            {"channel": c, "from": low, "to": high, "share": float(share[c])}
            | {f"{a}/{b}": float(sums[a][c] / sums[b][c]) for a, b in RATIOS}
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
    parser.add_argument("--picture", type=Path, help="file for a picture of the first of them")
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
        found = estimates(model, train, held_out, given.seeds, given.steps, given.latents)
        unit = float(_scale(model)[0]) if model.channels == 1 else 1.0
        rows = station_rows(found, unit)
        if given.picture:
            picture = station_picture(found[0], size_of(train), unit, model.config.data.origin)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(given.picture)
        result["stations"] = {"fields": len(held_out), "seeds": given.seeds, "steps": given.steps, "rows": rows}
    if given.complete:
        power = {}
        for name, run, latent in (
            ("complete", given.complete, given.complete_latent),
            ("partly", given.half, given.half_latent),
        ):
            model = InftyDiff.from_runs(run, latent, "cpu")
            drawn = model.sample(range(given.samples), options=SamplingOptions(str(given.steps)), batch_size=32)
            power[name] = _power(model.units.undo(drawn))
        partly = open_dataset(model.config.data, "train")
        known, generator = torch.stack([partly[i] for i in range(FILLED)]), stream(0, Purpose.BENCHMARK)
        whole = completed(known, measure_moments(known, generator), generator)
        data = _all(replace(model.config.data, root_dir=given.data or model.config.data.root_dir), "train", undo=True)
        some = _power(data[:FILLED])
        power["data"] = _power(data)
        for name, fields in (("smooth", fill_unknown(known)), ("completed", whole)):
            power[name] = _power(partly.units.undo(fields)) / some * power["data"]
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
