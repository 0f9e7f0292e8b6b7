"""Are samples copies of training images? How near both are, beside held-out images (Figures 13 to 15 in numbers).

    python experiments/memorisation.py --saved_model=landscapes-32 --samples=FOLDER --model=efficientnet_lite0

Of each sample, and of as many held-out images, the distance to the nearest training image is found among all of them:
by features of --model, and by pixels at the training size (root mean square, of values in [−1, 1]). A model that copies
has samples nearer to training images than held-out images are. The table has quantiles of both, and which part of the
samples is nearer than all but 5 % of the held-out images: more than 5 % where there are copies, and where samples lack
detail. Where training mirrored images, mirror images count too.

In --out_dir, by default beside the samples: memorisation.json, and memorisation.png with the samples nearest to
training images, and these. experiments/nearest_neighbours.py shows the neighbours of given samples.
"""

import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from PIL import Image

from configs.schema import ImageConfig
from experiments.support.options import define
from experiments.support.tables import aligned
from metrics.extractors import Extractor, open_extractor, pixels_extractor
from metrics.features import Extraction, cached_features, features
from metrics.images import DatasetImages, ImageFolder, ImageSet, Mirrored
from metrics.nearest import nearest_rows
from runtime.command import Command, readable_errors
from runtime.files import write_json
from runtime.precision import pick_device
from runtime.sheet import Row, save_sheet

FLAGS = flags.FLAGS
define("saved_model", "model", "weights", "device", "cache_dir", "num_samples", "out_dir",
       num_samples=", the first by name; default: all", out_dir="; default: SAMPLES_memorisation")  # fmt: skip
flags.DEFINE_string("samples", None, "folder, zip or tar of samples")
_BLOCK = 2048  # training images whose pixels are in memory at once
_SHOWN = 8
_QUANTILES = {"median": 0.5, "5 %": 0.05, "least": 0.0}


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        if not FLAGS.samples:
            raise ValueError("--samples is missing; accepted: a folder, zip or tar of images")
        device = pick_device(FLAGS.device)
        how = Extraction(threads=os.cpu_count() or 1, cache_dir=Path(FLAGS.cache_dir), device=device)
        ways = [open_extractor(FLAGS.model, device, FLAGS.weights),
                pixels_extractor(device, config.size, config.data.channels)]  # fmt: skip
        found, rows = {}, []
        for extractor in ways:
            samples = ImageFolder(FLAGS.samples, extractor.channels, "--samples", FLAGS.num_samples)
            training = DatasetImages(config, "train", extractor.channels)
            held_out = DatasetImages(config, "val", extractor.channels)
            views = [training, Mirrored(training)] if config.data.random_flip else [training]
            some = [held_out[i] for i in range(min(len(samples), len(held_out)))]
            of_samples, of_held_out = (features(images, extractor, how) for images in (samples, some))
            both = torch.cat([of_samples, of_held_out])
            distance, number = nearest_rows(both, chain.from_iterable(blocks(v, extractor, how) for v in views))
            if extractor.name == "pixels":
                distance = distance / both.shape[1] ** 0.5
            made, real = distance[: len(samples)], distance[len(samples) :]
            found[extractor.name] = {
                "samples": quantiles(made), "held out": quantiles(real),
                "nearer": float((made < real.quantile(0.05)).float().mean()),
            }  # fmt: skip
            nearest = made.argsort()[:_SHOWN].tolist()
            beside = [views[int(number[i]) // len(training)][int(number[i]) % len(training)] for i in nearest]
            label, names = f"nearest by {extractor.name}: samples, training images", [f"{made[i]:.3f}" for i in nearest]
            rows += [Row([picture(samples[i]) for i in nearest], label, names), Row([*map(picture, beside)])]
        folder = Path(FLAGS.samples).resolve()
        out = Path(FLAGS.out_dir) if FLAGS.out_dir else folder.with_name(f"{folder.stem}_memorisation")
        save_sheet(out / "memorisation.png", rows)
        counts = {"samples": len(samples), "held out": len(some), "training": len(training)}
        write_json(out / "memorisation.json", {**counts, "by": found})
    print(f"{', '.join(f'{count} {what}' for what, count in counts.items())}\n{table(found)}\nwritten: {out}")


def blocks(images: ImageSet, extractor: Extractor, how: Extraction) -> Iterator[torch.Tensor]:
    """Features of training images, cached; pixels, which are many numbers, some images at a time."""
    if extractor.name != "pixels":
        yield cached_features(images, extractor, how, title="training images")
        return
    for first in range(0, len(images), _BLOCK):
        some = [images[i] for i in range(first, min(first + _BLOCK, len(images)))]
        yield features(some, extractor, how, title="training images")


def quantiles(distances: torch.Tensor) -> dict[str, float]:
    return {name: float(distances.quantile(part)) for name, part in _QUANTILES.items()}


def picture(image: Any) -> Image.Image:
    """Uint8 (H, W, C) as Pillow has it."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Quantiles of the distances, a line for each kind of images."""
    lines = [["distance to the nearest training image", *_QUANTILES, "nearer than 95 % of held out"]]
    for way, row in found.items():
        for kind in ("samples", "held out"):
            shown = f"{row['nearer']:.1%}" if kind == "samples" else "5.0%"
            lines.append([f"{kind}, by {way}", *(f"{value:.4f}" for value in row[kind].values()), shown])
    return aligned(lines)


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main)
