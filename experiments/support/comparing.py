"""What the commands that compare samples with a data set have in common: flags, and the checks before the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from absl import flags

from configs.schema import ImageConfig
from experiments.support.options import define, require_run_of_weights
from infty_diff.model import InftyDiff
from metrics.extractors import Extractor, encoder_extractor
from runtime.command import readable_errors
from runtime.files import file_digest
from runtime.precision import pick_device

FLAGS = flags.FLAGS


def define_flags(compared: str, encoder: str) -> None:
    """Flags of every such command.

    Args:
        compared: what the images are called that samples are compared with.
        encoder: what the encoder of --encoder_run is for.
    """
    define("saved_model", "device", "cache_dir", "weights", "encoder_run_weights")
    flags.DEFINE_string("samples", None, "folder, zip or tar of samples")
    flags.DEFINE_string("encoder_run", None, f"stage-one run, or saved model, whose encoder {encoder}")
    flags.DEFINE_string("reference", None, f"folder, zip or tar of {compared} images, instead of a model's")


def compare(configs: dict[str, Any], work: Callable[[ImageConfig | None, Path, torch.device], str]) -> None:
    """Print what `work` says of the samples, given the configuration of a model if any."""
    with readable_errors():
        config: ImageConfig | None = configs.get("config")
        if not FLAGS.samples:
            raise ValueError("--samples is missing; accepted: a folder, zip or tar of images")
        if (config is None) == (FLAGS.reference is None):
            raise ValueError("--reference, --config, --saved_model; accepted: exactly one of them")
        require_run_of_weights("encoder_run_weights", FLAGS.encoder_run)
        said = work(config, Path(FLAGS.samples), pick_device(FLAGS.device))
    print(said)


def encoder_of_run(device: torch.device) -> Extractor:
    """The encoder of --encoder_run."""
    model = InftyDiff.from_runs(FLAGS.encoder_run, device=device, weights=FLAGS.encoder_run_weights)
    model, weights = model.in_full_precision(), file_digest(model.files["image"])
    return encoder_extractor(model.encode, model.config.size, model.config.data.channels, weights)
