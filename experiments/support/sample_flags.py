"""What the commands that compare samples with a data set have in common: flags, and the checks before the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from absl import flags

from configs.schema import ImageConfig
from metrics.features import Extraction
from runtime.command import readable_errors
from runtime.precision import pick_device

FLAGS = flags.FLAGS


def define_flags(compared: str) -> None:
    """Flags of every such command; the samples are compared with images called `compared`."""
    flags.DEFINE_string("samples", None, "folder or zip of samples")
    flags.DEFINE_string("reference", None, f"folder or zip of {compared} images, instead of --config")
    flags.DEFINE_enum("device", "auto", ("auto", "cpu", "cuda"), "device to run on")
    flags.DEFINE_string("cache_dir", str(Extraction.cache_dir), f"where features of {compared} images are kept")


def compare(configs: dict[str, Any], work: Callable[[ImageConfig | None, Path, torch.device], str]) -> None:
    """Print what `work` says of the samples, given --config if any."""
    with readable_errors():
        config: ImageConfig | None = configs.get("config")
        if not FLAGS.samples:
            raise ValueError("--samples: missing; accepted: a folder or zip of images")
        if (config is None) == (FLAGS.reference is None):
            raise ValueError("--reference, --config: accepted: exactly one of them")
        said = work(config, Path(FLAGS.samples), pick_device(FLAGS.device))
    print(said)
