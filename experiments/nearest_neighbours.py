"""Show the training images nearest to samples by LPIPS (Figures 13 to 15): are samples new, or copies?

    python experiments/nearest_neighbours.py --samples=checkpoints/ffhq_mollified_256_sampler/samples/256x256_ddim100 \\
        --config configs/ffhq_256_config.py --config.data.root_dir=ffhq.zip --num_samples=8

Left a sample, right its neighbours with their distances, nearest first; written as a picture and as JSON, by default
beside the folder of the samples. Where training mirrored images, mirror images are searched too. --metric=pixels and
--metric=random_features need no weights and still find copies. Where the run of --config exists, the images are those
it was trained on.
"""

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from configs.schema import ImageConfig
from experiments.support.sample_flags import compare, define_flags
from metrics.extractors import Extractor, open_extractor, pixels_extractor
from metrics.features import Extraction
from metrics.images import DatasetImages, ImageFolder, ImageSet, Mirrored
from metrics.nearest import Neighbour, nearest, pixel_distance, random_features_distance, sheet
from metrics.similarity import LPIPS_NETS, PairDistance, load_lpips
from runtime.command import Command, chosen_weights, define_weights_flags
from runtime.files import write_atomic, write_json

FLAGS = flags.FLAGS
define_flags("training")
flags.DEFINE_enum("metric", "lpips", ("lpips", "random_features", "pixels"), "distance that orders the neighbours")
flags.DEFINE_enum("net", "alex", tuple(LPIPS_NETS), "backbone of LPIPS")
flags.DEFINE_string("weights", None, "torchvision's file of that backbone; default: torch's cache, else a download")
flags.DEFINE_integer("num_samples", None, "number of samples, the first by name; default: 8 or all", lower_bound=1)
flags.DEFINE_integer("neighbours", 5, "neighbours shown of each", lower_bound=1)
flags.DEFINE_integer("shortlist", 200, "training images compared by --metric, nearest by a cheap one", lower_bound=1)
flags.DEFINE_string("encoder_run", None, "stage-one run whose encoder makes the shortlist; default: small pixels")
define_weights_flags("encoder_run")
flags.DEFINE_bool("mirrored", None, "search mirror images too; default: data.random_flip of --config, else yes")
flags.DEFINE_string("out", None, "the picture, JSON beside it; default: SAMPLES_neighbours_METRIC.png")
_SAMPLES = 8


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    compare(configs, show)


def show(config: ImageConfig | None, folder: Path, device: torch.device) -> str:
    """Write the picture and the report of the samples in a folder or zip; return where they are."""
    distance, extractor = open_distance(device), open_shortlist(device)
    everything = ImageFolder(FLAGS.samples, 3, "--samples")
    samples = ImageFolder(FLAGS.samples, 3, "--samples", FLAGS.num_samples or min(_SAMPLES, len(everything)))
    training = training_sets(config)
    how = Extraction(threads=os.cpu_count() or 1, cache_dir=Path(FLAGS.cache_dir))
    shortlist = max(FLAGS.shortlist, FLAGS.neighbours)
    found = nearest(samples, training, distance, extractor, how, count=FLAGS.neighbours, shortlist=shortlist)
    out = Path(FLAGS.out) if FLAGS.out else beside(folder)
    write_atomic(out, lambda path: sheet(samples, training, found).save(path, format="png"))
    write_json(out.with_suffix(".json"), report(samples, training, found, extractor))
    return f"nearest of {len(training[0])} training images by {FLAGS.metric}: {out}"


def open_distance(device: torch.device) -> PairDistance:
    """The distance of --metric."""
    if FLAGS.metric == "lpips":
        return load_lpips(FLAGS.net, FLAGS.weights, device)
    if FLAGS.weights:
        raise ValueError(f"--weights={FLAGS.weights}: accepted: with --metric=lpips")
    return pixel_distance if FLAGS.metric == "pixels" else random_features_distance(device)


def open_shortlist(device: torch.device) -> Extractor:
    """The features that make the shortlist."""
    if not FLAGS.encoder_run:
        return pixels_extractor(device)
    which = chosen_weights("encoder_run")
    extractor = open_extractor("encoder", device, encoder_run=FLAGS.encoder_run, encoder_weights=which)
    if extractor.channels != 3:
        raise ValueError(
            f"--encoder_run={FLAGS.encoder_run}: of {extractor.channels} channels; accepted: an RGB encoder"
        )
    return extractor


def training_sets(config: ImageConfig | None) -> list[ImageSet]:
    """The training images and, if wanted, their mirror images."""
    images = DatasetImages(config, "train", 3) if config else ImageFolder(FLAGS.reference, 3, "--reference")
    mirrored = config is None or config.data.random_flip if FLAGS.mirrored is None else FLAGS.mirrored
    return [images, Mirrored(images)] if mirrored else [images]


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


def beside(samples: Path) -> Path:
    """Where the picture goes: beside the folder or zip of samples."""
    return samples.resolve().with_name(f"{samples.resolve().stem}_neighbours_{FLAGS.metric}.png")


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, optional=("config",)).run(main)
