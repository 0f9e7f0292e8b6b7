"""Choose over how much of training weights are averaged, after training, and store that average as the run's weights.

    python experiments/choose_average.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256"
    python experiments/choose_average.py --config configs/ffhq_latent_config.py \\
        --decoder_config configs/ffhq_256_config.py

The run must have kept power-function averages: train.ema_lengths=(0.05, 0.10). Averages of other lengths are made from
their files by least squares. A length is the standard deviation of the weighting in time, as a fraction of the time
trained. Prints the held-out loss of each of --lengths beside that of the stored weights, and writes the best as
weights.safetensors, unless the stored weights are better. --length writes a given one. The misfit says how far the
weighting of an average is from that of its length; above 10 % it is shown, and not written. While the run is trained,
--nowrite alone is accepted.

Samples, encodings and filters belong to the weights they were made with: choose before stage two is trained.
"""

import contextlib
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from torch import nn

from configs.schema import ImageConfig, LatentConfig
from data.datasets import open_dataset
from experiments.support.options import define, require_run_of_weights
from infty_diff.encodings import load_or_encode
from infty_diff.model import InftyDiff
from models.factory import build_denoiser, build_encoder, build_latent_model
from runtime.command import Command, readable_errors, stages
from runtime.files import plain
from runtime.lock import FolderLock
from runtime.precision import Precision, pick_device
from runtime.stored import WEIGHTS, run_path
from runtime.weights import save_weights
from training.image_stage import ImageStage
from training.init_from import weights_of
from training.latent_stage import LatentStage
from training.power_averages import exponent
from training.snapshots import Reconstruction, read_snapshots
from training.stage import Stage

FLAGS = flags.FLAGS
flags.DEFINE_list("lengths", "0.01,0.02,0.03,0.04,0.05,0.07,0.10,0.14,0.20,0.25", "lengths that are compared")
flags.DEFINE_float("length", None, "write the average of this length, and compare no others")
flags.DEFINE_bool("write", True, "write the best average; else print the table alone")
define("decoder_run_weights")
_LARGEST_MISFIT = 0.1


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config, decoder = configs["config"], configs.get("decoder_config")
    run = run_path(config)
    with readable_errors(), contextlib.ExitStack() as held:
        require_run_of_weights("decoder_run_weights", decoder)
        networks = networks_of(config, decoder)
        lengths = parse_lengths()
        averages = Reconstruction(read_snapshots(run, networks, plain(asdict(config))))
        misfits = {length: averages.misfit(length) for length in lengths}
        if FLAGS.length and FLAGS.write and misfits[FLAGS.length] > _LARGEST_MISFIT:
            raise ValueError(f"--length is {FLAGS.length}, with a misfit of {misfits[FLAGS.length]:.0%} from the "
                             f"averages kept; accepted: a length with at most {_LARGEST_MISFIT:.0%}")  # fmt: skip
        if FLAGS.write:
            held.enter_context(FolderLock(run))
        _, stored, header = weights_of(run / WEIGHTS, networks)
        stage = open_stage(configs)
        if not stage.held_out_count and not FLAGS.length:
            raise ValueError("--length is missing; accepted: a length, for nothing is held out to choose it by")
        best = None, held_out_loss(stage, stored)
        print(f"{'length':>8}{'misfit':>8}  {stage.held_out}\n{'stored':>8}{'':>8}  {best[1]:.6f}{of_length(header)}")
        for length, misfit in misfits.items():
            loss = held_out_loss(stage, {**stored, **averages.tensors(length)})
            print(f"{length:8g}{misfit:8.1%}  {loss:.6f}", flush=True)
            if length == FLAGS.length or (misfit <= _LARGEST_MISFIT and loss < best[1]):
                best = length, loss
        length, loss = best
        if FLAGS.write and length:
            header |= {"step": averages.snapshots[-1].step}
            header |= {"average": {"length": length, "misfit": misfits[length], stage.held_out: loss}}
            save_weights(run / WEIGHTS, {**stored, **averages.tensors(length)}, header)
            print(f"written: {run / WEIGHTS}, the average of length {length:g} at step {header['step']}")
        else:
            print(f"best: {f'length {length:g}' if length else 'the stored weights'}; nothing written")


def parse_lengths() -> list[float]:
    """The lengths of the flags."""
    texts = FLAGS.lengths if FLAGS.length is None else [FLAGS.length]
    name = "lengths" if FLAGS.length is None else "length"
    try:
        lengths = list(dict.fromkeys(map(float, texts)))
        for length in lengths:
            exponent(length)
    except ValueError as error:
        raise ValueError(f"--{name} is {','.join(map(str, texts))}: {error}") from None
    if not lengths:
        raise ValueError(f"--{name} is empty; accepted: numbers, e.g. 0.05,0.10")
    return lengths


def networks_of(config: ImageConfig | LatentConfig, decoder: ImageConfig | None) -> dict[str, nn.Module]:
    """The networks of the run, on the meta device; decoder: the configuration of stage one, of a run of stage two."""
    with torch.device("meta"):
        if decoder is not None:
            return {"latent_model": build_latent_model(config.model, decoder.model.z_dim)}
        build = {"denoiser": build_denoiser, "encoder": build_encoder}
        return {name: make(config.model, config.data.channels, config.size) for name, make in build.items()}


def open_stage(configs: dict[str, Any]) -> ImageStage | LatentStage:
    """The stage of --config, as training has it."""
    config, decoder = configs["config"], configs.get("decoder_config")
    precision = Precision.create(pick_device(config.run.device), config.train.amp, config.train.amp_dtype)
    if decoder is None:
        val_set = open_dataset(config.data, "val") if config.data.val_ratio else None
        return ImageStage(config, open_dataset(config.data, "train"), val_set, precision)
    run, which = run_path(decoder), FLAGS.decoder_run_weights
    model = InftyDiff.from_runs(run, device=config.run.device, given=decoder, weights=which)
    return LatentStage(config, load_or_encode(model, model.config.data, model.files["image"]), model, precision)


def held_out_loss(stage: Stage, tensors: dict[str, torch.Tensor]) -> float:
    """The loss on held-out data with weights as an inference file names them; NaN where nothing is held out."""
    if not stage.held_out_count:
        return math.nan
    for name, module in stage.modules.items():
        prefix = f"{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        module.eval().requires_grad_(False)
    return stage.held_out_loss(stage.modules)


def of_length(header: dict[str, Any]) -> str:
    """What to say of stored weights that are a chosen average themselves."""
    return f"  (length {header['average']['length']:g})" if "average" in header else ""


if __name__ == "__main__":
    Command(__doc__, stages(sys.argv)).run(main)
