"""Show the training images nearest to samples by LPIPS (Figures 13 to 15): are samples new, or copies?

    python experiments/nearest_neighbours.py --samples=checkpoints/ffhq_mollified_256_sampler/samples/256x256_ddim100 \\
        --config configs/ffhq_256_config.py --config.data.root_dir=ffhq.zip --num_samples=8

Left a sample, right its neighbours with their distances, nearest first. Written as METRIC.png and METRIC.json, by
default into a folder beside that of the samples. Where training mirrored images, mirror images are searched too.
--metric=pixels and --metric=random_features need no weights and still find copies. Where the run of --config exists,
the images are those it was trained on.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from PIL import Image

from configs.schema import ImageConfig
from experiments.support.comparing import compare, define_flags, encoder_of_run
from experiments.support.options import between, define
from metrics.extractors import Extractor, pixels_extractor
from metrics.features import Extraction
from metrics.images import DatasetImages, ImageFolder, ImageSet, Mirrored
from metrics.nearest import Neighbour, nearest, pixel_distance, random_features_distance
from metrics.similarity import LPIPS_NETS, PairDistance, load_lpips
from runtime.command import Command
from runtime.files import write_json
from runtime.sheet import Row, save_sheet

FLAGS = flags.FLAGS
define_flags("training", "makes the shortlist; default: small pixels do")
flags.DEFINE_enum("metric", "lpips", ("lpips", "random_features", "pixels"), "distance that orders the neighbours")
flags.DEFINE_enum("net", "alex", tuple(LPIPS_NETS), "backbone of LPIPS")
define("num_samples", "out_dir", num_samples=", the first by name; default: 8 or all",
       out_dir="; default: SAMPLES_nearest_neighbours")  # fmt: skip
flags.DEFINE_integer("neighbours", 5, "neighbours shown of each", **between(1, 1000))
flags.DEFINE_integer("shortlist", 200, "training images compared by --metric, nearest by a cheap one",
                     **between(1, 10**7))  # fmt: skip
flags.DEFINE_bool("mirrored", None, "search mirror images too; default: data.random_flip of --config, else yes")
_SAMPLES = 8


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    compare(configs, show)


def show(config: ImageConfig | None, folder: Path, device: torch.device) -> str:
    """Write the picture and the report of the samples in a folder or zip; return where they are."""
    distance, extractor = open_distance(device), open_shortlist(device)
    everything = ImageFolder(FLAGS.samples, 3, "--samples")
    samples = ImageFolder(FLAGS.samples, 3, "--samples", FLAGS.num_samples or min(_SAMPLES, len(everything)))
    training = training_sets(config)
    how = Extraction(threads=os.cpu_count() or 1, cache_dir=Path(FLAGS.cache_dir), device=device)
    shortlist = max(FLAGS.shortlist, FLAGS.neighbours)
    found = nearest(samples, training, distance, extractor, how, count=FLAGS.neighbours, shortlist=shortlist)
    beside = folder.resolve().with_name(f"{folder.resolve().stem}_nearest_neighbours")
    out = (Path(FLAGS.out_dir) if FLAGS.out_dir else beside) / f"{FLAGS.metric}.png"
    save_sheet(out, sheet_rows(samples, training, found), ["sample", "nearest"])
    write_json(out.with_suffix(".json"), report(samples, training, found, extractor))
    return f"nearest of {len(training[0])} training images by {FLAGS.metric}: {out}"


def open_distance(device: torch.device) -> PairDistance:
    """The distance of --metric."""
    if FLAGS.metric == "lpips":
        return load_lpips(FLAGS.net, FLAGS.weights, device)
    if FLAGS.weights:
        raise ValueError(f"--weights is {FLAGS.weights}; accepted: with --metric=lpips")
    return pixel_distance if FLAGS.metric == "pixels" else random_features_distance(device)


def open_shortlist(device: torch.device) -> Extractor:
    """The features that make the shortlist."""
    if not FLAGS.encoder_run:
        return pixels_extractor(device)
    extractor = encoder_of_run(device)
    if extractor.channels != 3:
        raise ValueError(
            f"--encoder_run is {FLAGS.encoder_run}: of {extractor.channels} channels; accepted: an RGB encoder"
        )
    return extractor


def training_sets(config: ImageConfig | None) -> list[ImageSet]:
    """The training images and, if wanted, their mirror images."""
    images = DatasetImages(config, "train", 3) if config else ImageFolder(FLAGS.reference, 3, "--reference")
    mirrored = config is None or config.data.random_flip if FLAGS.mirrored is None else FLAGS.mirrored
    return [images, Mirrored(images)] if mirrored else [images]


def sheet_rows(samples: ImageSet, training: list[ImageSet], found: list[list[Neighbour]]) -> list[Row]:
    """Left a sample, right its neighbours with their distances."""
    rows = []
    for i, row in enumerate(found):
        images = [samples[i], *(training[n.view][n.index] for n in row)]
        rows.append(Row([*map(Image.fromarray, images)], captions=[samples.item_name(i)]
                        + [f"{n.distance:.4f}" for n in row]))  # fmt: skip
    return rows


def report(
    samples: ImageSet, training: list[ImageSet], found: list[list[Neighbour]], extractor: Extractor
) -> dict[str, Any]:
    """What the picture shows, by name."""
    rows = [
        {
            "sample": samples.item_name(i),
            "neighbours": [{"image": training[n.view].item_name(n.index), "distance": n.distance} for n in row],
        }
        for i, row in enumerate(found)
    ]
    return {
        "metric": f"lpips, {FLAGS.net}" if FLAGS.metric == "lpips" else FLAGS.metric,
        "weights": FLAGS.weights,
        "shortlist": {"images": max(FLAGS.shortlist, FLAGS.neighbours), "extractor": extractor.identity()},
        "samples": samples.path,
        "training": [{"path": images.path, "images": len(images)} for images in training],
        "nearest": rows,
    }


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, optional=("config",)).run(main)
