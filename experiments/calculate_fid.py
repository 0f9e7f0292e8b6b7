"""Score a folder of samples: FID_CLIP or FID, KID, precision and recall, and for large images patch FID.

    python experiments/calculate_fid.py --samples=checkpoints/ffhq_mollified_256_sampler/samples/256x256_ddim100 \\
        --config configs/ffhq_256_config.py --config.data.root_dir=ffhq.zip

The reference is the data of --config or --saved_model, or any folder, zip or tar given as --reference. Where the run
of --config exists, it is the data which that run was trained on; data.root_dir says where they lie. Weights come from
the usual caches of torch and open_clip, are downloaded, or are given by --weights. Those of --model=efficientnet_lite0
come with a package of the extra `eval`; --model=random_features needs none, and measures nothing but that everything
works. Features of the reference are kept in --cache_dir. The report is printed and written as JSON, by default into the
folder of the samples. Beside the distance it has its floor, that of as many real images. Under torchrun rank 0 does
the work.

--protocol=clean (default) takes the PNGs as they are, and the images of the training split unmirrored.
--protocol=reference does what the authors do: mollified samples (--save_raw) as float16, Wiener-filtered here and
cut to 8 bit; reference images mirrored at random; for FFHQ the training and the validation images. Where the network
predicts x_0, the PNGs hold its own estimate, which no filter touched. Its raw files are mollified all the same, so
--protocol=reference scores their filtered form, as for any other model, and --protocol=clean the network's estimate.
"""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from configs.schema import ImageConfig
from configs.validate import shown
from data.datasets import SPLITS
from diffusion.factory import build_image_process
from experiments.support.comparing import compare, define_flags, encoder_of_run
from experiments.support.options import between, define, sampling_options
from experiments.support.parsing import parse_size
from infty_diff.filter_file import CALIBRATED
from metrics.evaluation import evaluate, table
from metrics.extractors import open_extractor
from metrics.features import Extraction
from metrics.images import DatasetImages, ImageFolder, ImageSet, Mirrored, MollifiedSamples, config_digest
from runtime.command import Command
from runtime.files import write_json

FLAGS = flags.FLAGS
define_flags("reference", "--model=encoder takes")
define("model", "num_samples", "inv_snr", num_samples=", the first by name; default: all",
       inv_snr=", with --protocol=reference")  # fmt: skip
flags.DEFINE_integer("patches", 0, "patches an image for patch FID; 0 = no patch FID", **between(0, 10_000))
flags.DEFINE_enum("protocol", "clean", ("clean", "reference"), "how images are prepared; reference = the authors' way")
flags.DEFINE_enum("split", None, SPLITS, "part of the data set of the model; default: train (see also --protocol)")
flags.DEFINE_string("reference_size", None, "size of the data set's images, 256 or 192x320; default: that of training")
flags.DEFINE_integer("eval_batch_size", 0, "images in the network at once; 0 = 64, on a CPU 4", **between(0, 65_536))
flags.DEFINE_string("json", None, "file of the report; default: fid_MODEL[_reference].json beside the samples")
_FLIP_SEED = 0


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    compare(configs, score)


def score(config: ImageConfig | None, folder: Path, device: torch.device) -> str:
    """Write the report of the samples in a folder or zip; return its table."""
    if (FLAGS.model == "encoder") != bool(FLAGS.encoder_run):
        raise ValueError(f"--encoder_run is {FLAGS.encoder_run}; accepted: a stage-one run, with --model=encoder alone")
    extractor = encoder_of_run(device) if FLAGS.encoder_run else open_extractor(FLAGS.model, device, FLAGS.weights)
    samples, reference = image_sets(config, extractor.channels)
    how = Extraction(FLAGS.eval_batch_size, os.cpu_count() or 1, Path(FLAGS.cache_dir), device)
    report = evaluate(samples, reference, extractor, how, FLAGS.patches)
    report["protocol"] = FLAGS.protocol
    report["config_sha256"] = config_digest(asdict(config)) if config else None
    report["samples"]["manifest"] = samples.manifest
    path = Path(FLAGS.json) if FLAGS.json else default_report(folder)
    write_json(path, report)
    return f"{table(report)}\nwritten: {path}"


def image_sets(config: ImageConfig | None, channels: int) -> tuple[ImageSet, ImageSet]:
    """The samples and the reference images that the command line names."""
    authors = FLAGS.protocol == "reference"
    if FLAGS["inv_snr"].present and not authors:
        raise ValueError(f"--inv_snr is {shown(FLAGS.inv_snr)}; accepted: with --protocol=reference")
    if authors and config is None:
        raise ValueError("--protocol is reference; accepted: with --config, which says how samples were mollified")
    if authors:
        mollifier, inv_snr = build_image_process(config).mollifier, sampling_options().inv_snr
        if inv_snr == CALIBRATED:
            raise ValueError(f"--inv_snr is {CALIBRATED}; accepted: a number, with --protocol=reference")
        samples = MollifiedSamples(FLAGS.samples, mollifier, inv_snr, channels, FLAGS.num_samples)
    else:
        samples = ImageFolder(FLAGS.samples, channels, "--samples", FLAGS.num_samples)
    if config is None:
        for name in ("reference_size", "split"):
            if FLAGS[name].value:
                raise ValueError(f"--{name} is {shown(FLAGS[name].value)}; accepted: with --config")
        return samples, ImageFolder(FLAGS.reference, channels, "--reference")
    if FLAGS.reference_size:
        height, width = parse_size(FLAGS.reference_size, "reference_size")
        config = replace(config, data=replace(config.data, img_size=height, img_width=width))
    split = FLAGS.split or ("all" if authors and config.data.name == "ffhq" else "train")
    reference = DatasetImages(config, split, channels)
    return samples, Mirrored(reference, _FLIP_SEED) if authors else reference


def default_report(samples: Path) -> Path:
    """Where the report goes: into the folder of samples, or beside the zip."""
    name = f"fid_{FLAGS.model}{'_reference' if FLAGS.protocol == 'reference' else ''}.json"
    return samples / name if samples.is_dir() else samples.with_name(f"{samples.stem}_{name}")


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, optional=("config",)).run(main)
