"""Draw above the training size on the whole lattice and on one that grows: times, quality, and how far seeds drift.

    python benchmarks/progressive.py --json=benchmarks/results/progressive.json
    python benchmarks/progressive.py --quick

All draw the same seeds from a trained model, at --factor times its training size. ddim asks the network at every pixel,
the others on a lattice that grows by their δ. The table says of each

    evaluated  pixels of a step at which the network is asked, over those of the whole lattice
    seconds    of the sampler for an image, the median of batches that are drawn in turns in this run
    distance   the Fréchet distance of the samples from held-out images drawn at that size
    drift      ‖a − b‖ / ‖b‖ of the mollified images a, read at the pixels of the training size by their cosine series,
               and b, which ddim draws there from the same seeds
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from benchmarks.interleaved import interleaved
from benchmarks.report import machine
from data.datasets import open_dataset
from data.pixels import to_uint8
from diffusion.coordinates import Size
from diffusion.progressive import lattices
from diffusion.samplers import SAMPLERS, LastEstimate
from diffusion.series import on_lattice
from infty_diff.model import InftyDiff, SamplingOptions
from metrics.extractors import EXTRACTORS, Extractor, open_extractor
from metrics.frechet import Gaussian, frechet_distance, gaussian_of
from runtime.files import write_json

GROWING = {f"delta {delta:g}": replace(SAMPLERS["progressive"], delta=delta) for delta in (0.01, 0.05, 0.2)}
QUICK = {"factor": 2, "images": 2, "references": 3, "steps": "3", "latent_steps": "3", "repeats": 1, "batch": 2,
         "extractor": "random_features"}  # fmt: skip


def features_of(extractor: Extractor, images: torch.Tensor) -> torch.Tensor:
    """Features (B, D) of uint8 images (B, C, H, W)."""
    prepared = [torch.from_numpy(extractor.prepare(image.permute(1, 2, 0).numpy()).copy()) for image in images]
    with torch.no_grad():
        return extractor.network(torch.stack(prepared).permute(0, 3, 1, 2)).float().cpu()


def held_out(model: InftyDiff, size: Size, count: int, extractor: Extractor) -> Gaussian:
    """The features of the first held-out images, drawn at a size."""
    data = replace(model.config.data, img_size=size[0], img_width=size[1], in_memory="never")
    images = open_dataset(data, "val")
    numbers = range(min(count, len(images)))
    return gaussian_of(torch.cat([features_of(extractor, images[i][None]) for i in tqdm(numbers, "references")]))


def measure(
    model: InftyDiff,
    extractor: Extractor,
    *,
    factor: int,
    images: int,
    references: int,
    steps: str,
    latent_steps: str,
    repeats: int,
    batch: int,
) -> list[dict[str, Any]]:
    """One row for each way to draw; the arguments are those of the command."""
    at_training = model.config.size
    size = factor * at_training[0], factor * at_training[1]
    reference = held_out(model, size, references, extractor)
    ways = ["ddim", *GROWING]

    def drawn(name: str, seeds: range, own: Size, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last, options = LastEstimate(), SamplingOptions(steps, name)
        mollified = model.decode(latents, model.initial_noise(seeds, own), options, deblur=False, callback=last)
        return mollified, model.sharpened(mollified, last.denoised, options.inv_snr)

    timed = range(images, images + batch)
    latents = model.draw_latents(timed, latent_steps)
    calls = {name: lambda _, name=name: drawn(name, timed, size, latents) for name in ways}
    times = interleaved(calls, model.device, repeats, warmup=1)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    errors = dict.fromkeys(ways, 0.0)
    norm = 0.0
    for start in tqdm(range(0, images, batch), "samples"):
        seeds = range(start, min(start + batch, images))
        latents = model.draw_latents(seeds, latent_steps)
        b = drawn("ddim", seeds, at_training, latents)[0]
        norm += float(b.square().sum())
        for name in ways:
            mollified, image = drawn(name, seeds, size, latents)
            errors[name] += float((on_lattice(mollified, at_training) - b).square().sum())
            found[name].append(features_of(extractor, to_uint8(image).cpu()))
    process, rows = model.process.respaced(steps), []
    for name in ways:
        delta = SAMPLERS[name].delta
        asked = [size] if delta is None else lattices(process, model.data_spectrum(), size, delta)
        rows.append({
            "way": name, "evaluated": sum(h * w for h, w in asked) / len(asked) / (size[0] * size[1]),
            "seconds": times[name].ms / 1e3 / batch, "repeats": times[name].repeats,
            "distance": frechet_distance(gaussian_of(torch.cat(found[name])), reference),
            "references": reference.count, "drift": (errors[name] / norm) ** 0.5,
        })  # fmt: skip
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as aligned text; times and distances beside ddim's."""
    rows = result["rows"]
    lines = [
        f"{result['model']} at {result['factor']} times its training size, {result['steps']} steps",
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}, {result['date']}, commit "
        f"{result['commit']}",
        f"{result['images']} samples, {rows[0]['references']} held-out images, batches of {result['batch']}; distance: "
        f"{result['metric']}",
        "",
        f"{'':<12}{'evaluated':>10}{'seconds':>10}{'of ddim':>9}{'distance':>10}{'of ddim':>9}{'drift':>8}",
    ]
    for row in rows:
        seconds, distance = (row[name] / rows[0][name] for name in ("seconds", "distance"))
        lines.append(
            f"{row['way']:<12}{row['evaluated']:>10.1%}{row['seconds']:>10.3f}{seconds:>9.1%}"
            f"{row['distance']:>10.2f}{distance:>9.1%}{row['drift']:>8.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="landscapes-32", help="weights: a name in weights/, or a folder")
    parser.add_argument("--factor", type=int, default=4, help="size of the images over the training size")
    parser.add_argument("--images", type=int, default=1000, help="samples that are scored, of each way")
    parser.add_argument("--references", type=int, default=2500, help="held-out images at most")
    parser.add_argument("--steps", default="25", help="of the image model")
    parser.add_argument("--latent_steps", default="100", help="of the latent model")
    parser.add_argument("--repeats", type=int, default=5, help="batches that are timed")
    parser.add_argument("--batch", type=int, default=4, help="images drawn together")
    parser.add_argument("--extractor", choices=EXTRACTORS, default="efficientnet_lite0", help="of features")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--json", type=Path, help="file for the result; default: none, the table alone")
    parser.add_argument("--quick", action="store_true", help="two images at twice the training size")
    arguments = parser.parse_args()
    if arguments.json and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        parser.error(f"--json is {arguments.json}; accepted: a file in a folder that exists")
    settings = {name: getattr(arguments, name) for name in QUICK} | (QUICK if arguments.quick else {})
    fewest = {"factor": 2, "images": 2, "references": 2, "repeats": 1, "batch": 1}
    for name, least in fewest.items():
        if settings[name] < least:
            parser.error(f"--{name} is {settings[name]}; accepted: whole numbers from {least}")
    try:
        model = InftyDiff.from_runs(arguments.model, device=arguments.device)
        extractor = open_extractor(settings["extractor"], model.device)
        with mock.patch.dict(SAMPLERS, GROWING):
            rows = measure(model, extractor, **{k: v for k, v in settings.items() if k != "extractor"})
    except ValueError as error:
        parser.error(str(error))
    result = {"benchmark": "progressive", **machine(model.device), "model": arguments.model, "metric": extractor.metric,
              **settings, "rows": rows}  # fmt: skip
    if arguments.json:
        write_json(arguments.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
