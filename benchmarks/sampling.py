"""Time one evaluation of the denoiser on whole grids, as samplers make them, at and above the training resolution.

    python benchmarks/sampling.py --config configs/ffhq_256_config.py --sizes=256,512,1024 --json=PATH

Above it every depthwise kernel is enlarged with the grid. A row compares the network on model.backend with the same
network on --baseline, which by default convolves with the enlarged kernel directly. With --guided an evaluation is one
of guided inpainting, which computes the gradient of the state too. Weights are random: times do not depend on them.
Both sides take turns; times are medians; peak memory is what one evaluation needs beside the network and its input,
measured before the times. max_error is the largest difference of the two outputs over the largest value.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from torch import nn

from benchmarks.interleaved import interleaved
from benchmarks.report import circumstances, peak_memory, reset_peak_memory, sampling_table
from configs.schema import ImageConfig
from diffusion.conditioning import Known
from diffusion.random import Purpose, seed_global, stream
from experiments.support.parsing import parse_size
from infty_diff.model import InftyDiff
from models.factory import build_denoiser, for_evaluation
from models.sparse_unet import SparseUNet
from runtime.command import Command, readable_errors
from runtime.files import write_json
from runtime.precision import Precision, pick_device

FLAGS = flags.FLAGS
flags.DEFINE_list(
    "sizes", None, "resolutions, e.g. 256,512,768x1024; default: that of training, twice and four times it"
)
flags.DEFINE_string("baseline", "torch_dense", "back end to compare with; empty = none")
flags.DEFINE_bool("guided", False, "evaluate as guided inpainting does, with the gradient of the state")
flags.DEFINE_integer("batch", 1, "images", lower_bound=1, upper_bound=10**6)
flags.DEFINE_integer("repeats", 20, "timed evaluations of each", lower_bound=1, upper_bound=10**6)
flags.DEFINE_string("json", None, "file for the result; default: none, the table on standard output alone")

_LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def networks(config: ImageConfig, backends: list[str], device: torch.device) -> list[SparseUNet]:
    """The same random denoiser on each back end; they share their weights."""
    seed_global(config.run.seed, Purpose.WEIGHTS)
    made: list[SparseUNet] = []
    for backend in backends:
        model = dataclasses.replace(config.model, backend=backend)
        with torch.device("meta" if made else device):
            network = build_denoiser(model, config.data.channels, config.size)
        if made:
            network.load_state_dict(made[0].state_dict(), assign=True)
        made.append(for_evaluation(network))
    return made


def evaluation(
    network: SparseUNet, config: ImageConfig, size: tuple[int, int], batch: int, precision: Precision, guided: bool
) -> Callable[[int], torch.Tensor]:
    """An evaluation as samplers make it, halfway through 100 steps, at random states and latents of that size."""
    device, generator = precision.device, stream(0, Purpose.BENCHMARK)
    x = torch.randn(batch, config.data.channels, *size, generator=generator).to(device)
    z = torch.randn(batch, config.model.z_dim, generator=generator).to(device)
    step = torch.full((batch,), 50, device=device)
    model = InftyDiff(config, nn.Identity(), network, precision=precision)  # nothing is encoded
    process = model.process.respaced("100")
    denoise = model.denoiser_at(z, process)
    if guided:
        mask = torch.ones(size, dtype=torch.bool, device=device)
        mask[: size[0] // 2] = False
        denoise = Known(x, mask, process, model.deblur).guided(denoise)

    @torch.no_grad()
    def call(_: int) -> torch.Tensor:
        denoised = denoise(x, step)
        return denoised.gradient if guided else denoised.noise

    return call


def measure(
    config: ImageConfig,
    precision: Precision,
    sizes: list[tuple[int, int]],
    baseline: str,
    batch: int,
    repeats: int,
    guided: bool = False,
) -> list[dict[str, Any]]:
    """One row per resolution. Raises ArithmeticError when the two networks disagree."""
    device = precision.device
    pair = networks(config, [config.model.backend, baseline][: 2 if baseline else 1], device)
    rows = []
    for size in sizes:
        calls = [evaluation(network, config, size, batch, precision, guided) for network in pair]
        outputs, peaks = [], []
        for call in calls:
            call(0)  # what is kept from one evaluation to the next is not counted
            reset_peak_memory(device)
            before = peak_memory(device)
            outputs.append(call(0).float())
            peaks.append(peak_memory(device) - before)
        error = ((outputs[0] - outputs[-1]).abs().max() / outputs[-1].abs().max()).item()
        if not error <= _LARGEST_ERROR[precision.dtype or torch.float32]:
            raise ArithmeticError(f"the back ends differ by {error:.1e} at {size}; times of wrong results mean nothing")
        times = interleaved(dict(zip(("ours", "baseline"), calls)), device, repeats, warmup=1)
        ours, theirs = times["ours"], times.get("baseline")
        rows.append(
            {
                "size": list(size),
                "batch": batch,
                "guided": guided,
                "backend": pair[0].backend.name,
                "ms": ours.ms,
                "quartiles": [ours.low, ours.high],
                "peak_memory_bytes": peaks[0],
                "repeats": ours.repeats,
            }
        )
        if theirs is not None:
            rows[-1] |= {
                "baseline": pair[1].backend.name,
                "baseline_ms": theirs.ms,
                "baseline_quartiles": [theirs.low, theirs.high],
                "baseline_peak_memory_bytes": peaks[1],
                "baseline_repeats": theirs.repeats,
                "speedup": theirs.ms / ours.ms,
                "max_error": error,
            }
    return rows


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        height, width = config.size
        sizes = [(factor * height, factor * width) for factor in (1, 2, 4)]
        if FLAGS.sizes:
            sizes = [parse_size(text, "sizes") for text in FLAGS.sizes]
        path = Path(FLAGS.json) if FLAGS.json else None
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--json is {path}; accepted: a file in a folder that exists")
        precision = Precision.create(pick_device(config.run.device), config.train.amp, config.train.amp_dtype)
        result = {"benchmark": "sampling", **circumstances(config, precision)}
        result["rows"] = measure(config, precision, sizes, FLAGS.baseline, FLAGS.batch, FLAGS.repeats, FLAGS.guided)
        if path:
            write_json(path, result)
    print(sampling_table(result))


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, as_given=("config",)).run(main)
