"""Time a training step of stage one, whole and by part.

    python benchmarks/train_step.py --config configs/ffhq_256_config.py --ratios=1,0.5,0.25,0.125 --json=PATH

Data are random images that are already in memory; reading images is not measured. The whole step is what
`Trainer.train_step` takes, from an idle device to an idle device. The parts are taken from further, instrumented steps:
a clock (benchmarks/part_clock.py) is switched where a part begins and ends, in the backward pass by marks in the graph,
so that the parts add up to those steps and their sum beside the whole shows what the instruments cost. "Other of
networks and loss" is linears, embeddings, gathers of points, noise, loss and the way back through them; "rest of the
step" is seeding, copying the batch to the device and summing up what is logged.

All ratios and both kinds of step take turns with one set of weights, so that drifts of the machine hit all alike.
Times are medians; a step that updates the averaged weights counts once in train.ema_update_every. Peak memory is
that of uninstrumented steps: allocated on a GPU; on a CPU the growth of the resident set since before the networks
were built, ratios in ascending order because the process may hold on to memory of an earlier one.
"""

import contextlib
import dataclasses
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from absl import flags
from torch import nn

import models.coarse_nodes
import training.image_stage
from benchmarks.part_clock import BACKWARD, OUTSIDE, Part, PartClock
from benchmarks.report import circumstances, peak_memory, reset_peak_memory, step_table
from configs.flags import Command, readable_errors
from configs.schema import ImageConfig
from diffusion.mollifier import Mollifier
from training.files import write_json
from training.image_stage import ImageStage
from training.precision import Precision, pick_device
from training.run_dir import RunDir
from training.trainer import Trainer

FLAGS = flags.FLAGS
flags.DEFINE_string("ratios", None, "parts of the lattice seen, e.g. 1,0.5,0.25; default: mc_integral.q_sample points")
flags.DEFINE_integer("repeats", 20, "timed steps of each kind; at least train.ema_update_every", lower_bound=1)
flags.DEFINE_integer("warmup", 3, "steps before, for each ratio", lower_bound=1)
flags.DEFINE_string("json", None, "file for the result; default: none, the table on standard output alone")

OTHER = "other of networks and loss"
_NETWORK_PARTS = ("sparse plan", "sparse convolutions", "sparse norms and MLPs", "k-NN", "points to grid", "grid U-Net")
PARTS = (
    "coordinates",
    "mollifier",
    *(f"encoder {part}" for part in _NETWORK_PARTS),
    *(f"denoiser {part}" for part in _NETWORK_PARTS),
    "denoiser grid to points",
    OTHER,
    "gradient clipping",
    "optimiser",
    "averaged weights",
    OUTSIDE.name,
)
_INPUT_SETS = 4  # batches taken in turn, so that no cache holds the data of the next step


class RandomImages:
    """An `ImageDataset` of uniform noise."""

    name, pixels = "random", None

    def __init__(self, count: int, channels: int, size: tuple[int, int]) -> None:
        self.count, self.channels, self.size = count, channels, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(i)
        return torch.randint(0, 256, (self.channels, *self.size), dtype=torch.uint8, generator=generator)


def point_counts(config: ImageConfig, ratios: str | None) -> list[int]:
    """Points per image of every ratio in a comma-separated list, ascending; those of the configuration for None.

    Raises ValueError for ratios that are no numbers, not in (0, 1], repeated, or too small for the neighbours.
    """
    if ratios is None:
        return [config.mc_integral.q_sample]
    pixels, counts = math.prod(config.size), []
    for text in ratios.split(","):
        try:
            ratio = float(text)
        except ValueError:
            ratio = math.nan
        count = int(pixels * ratio) if 0 < ratio <= 1 else 0
        if count < config.model.knn_neighbours:
            raise ValueError(
                f"--ratios={ratios}: {text!r} is not accepted; accepted: numbers above 0 and up to 1 that leave at "
                f"least {config.model.knn_neighbours} of {pixels} points"
            )
        if count in counts:
            raise ValueError(f"--ratios={ratios}: {text!r} stands for {count} points a second time; accepted: once")
        counts.append(count)
    return sorted(counts)


def build_trainer(config: ImageConfig, precision: Precision) -> Trainer:
    """A trainer on random images, of which nothing is written to disk."""
    images = RandomImages(config.train.batch_size * _INPUT_SETS, config.data.channels, config.size)
    torch.manual_seed(config.run.seed)
    stage = ImageStage(config, images, images, precision)
    with tempfile.TemporaryDirectory() as empty:
        nowhere = dataclasses.replace(config, run=dataclasses.replace(config.run, root_dir=empty))
        return Trainer(config, stage, RunDir(nowhere, resume=False), precision)


@contextlib.contextmanager
def instrumented(trainer: Trainer, clock: PartClock) -> Iterator[None]:
    """Let `clock` follow the steps of a trainer; afterwards everything is as before."""
    stage = trainer.stage
    with contextlib.ExitStack() as patches:

        def replace(owner: Any, attribute: str, stand_in: Any) -> None:
            patches.enter_context(mock.patch.object(owner, attribute, stand_in))

        def time(owner: Any, attribute: str, name: str) -> None:
            replace(owner, attribute, clock.timed(name, getattr(owner, attribute)))

        def time_both_ways(module: nn.Module, name: str) -> None:
            replace(module, "forward", clock.timed_both_ways(name, module.forward))

        def time_gather(attribute: str, making: str, name: str) -> None:
            make = clock.timed(making, getattr(models.coarse_nodes, attribute))
            replace(models.coarse_nodes, attribute, lambda *args: clock.timed_both_ways(name, make(*args)))

        for name, network in stage.modules.items():
            for block in [*network.down_blocks, *getattr(network, "up_blocks", [])]:
                convolution = clock.timed_both_ways("{} sparse convolutions", block.backend.conv)
                replace(block, "backend", SimpleNamespace(conv=convolution))
                time_both_ways(block, "{} sparse norms and MLPs")
            time_both_ways(network.grid, "{} grid U-Net")
            time(network, "plan", "{} sparse plan")
            replace(network, "forward", clock.within(name, network.forward))

        time_gather("points_to_grid", "{} k-NN", "{} points to grid")
        time_gather("grid_to_points", "{} grid to points", "{} grid to points")
        time(training.image_stage, "draw_points", "coordinates")
        time(Mollifier, "__call__", "mollifier")
        time(stage, "loss", OTHER)
        time(nn.utils, "clip_grad_norm_", "gradient clipping")
        time(trainer.optimizer, "zero_grad", "optimiser")
        for method in ("unscale_", "step", "update"):
            time(trainer.scaler, method, "optimiser")
        time(trainer.ema, "update", "averaged weights")
        replace(torch.Tensor, "backward", _timed_backward(clock))
        yield


def _timed_backward(clock: PartClock) -> Any:
    backward, part = torch.Tensor.backward, Part(OTHER, BACKWARD)

    def timed(loss: torch.Tensor) -> None:
        clock.enter(part)
        backward(loss)
        clock.leave(part)

    return timed


class StepTimer:
    """Runs steps of one trainer at several numbers of points per image.

    config: a configuration; its number of points is not used. precision: device and autocast type.
    """

    def __init__(self, config: ImageConfig, precision: Precision) -> None:
        self.config, self.trainer = config, build_trainer(config, precision)
        self.clock = PartClock(precision.device)
        images, batch_size = self.trainer.stage.train_set, config.train.batch_size
        self.batches = [
            torch.stack([images[first + i] for i in range(batch_size)]) for first in range(0, len(images), batch_size)
        ]
        if precision.device.type == "cuda":
            self.batches = [batch.pin_memory() for batch in self.batches]

    def step(self, number: int, count: int, by_part: bool) -> dict[Part, float]:
        """Milliseconds by part, or all in one part, of step `number` with `count` points per image."""
        integral = dataclasses.replace(self.config.mc_integral, q_sample=count)
        self.trainer.stage.config = dataclasses.replace(self.config, mc_integral=integral)
        self.trainer.step = number  # of which coordinates, times, noise and the update of the averages follow
        with instrumented(self.trainer, self.clock) if by_part else contextlib.nullcontext():
            self.clock.begin()
            self.trainer.train_step(self.batches[number % len(self.batches)])
            return self.clock.end()

    def check(self) -> None:
        """Raises FloatingPointError unless the loss is finite and every parameter has a finite gradient.

        With a loss scaler gradients may overflow: it then lowers the scale.
        """
        may_overflow = self.trainer.scaler.is_enabled()
        loss = self.trainer.means.sums["loss"].item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}; times of such a step mean nothing")
        for network, module in self.trainer.stage.modules.items():
            for name, parameter in module.named_parameters():
                gradient = parameter.grad
                if gradient is None or not (may_overflow or bool(gradient.isfinite().all())):
                    raise FloatingPointError(f"{network}.{name} has no finite gradient after a step")

    def per_step(self, values: list[float]) -> float:
        """Typical time of steps 0, 1, …, of which every train.ema_update_every-th updates the averages."""
        every = self.config.train.ema_update_every
        updating = values[every - 1 :: every]
        others = [value for i, value in enumerate(values) if (i + 1) % every]
        typical = statistics.median(others) if others else 0.0
        return typical + (statistics.median(updating) - typical) / every


def measure(config: ImageConfig, precision: Precision, counts: list[int], warmup: int, repeats: int) -> list[dict]:
    """One row of results for every number of points per image, in the order of `counts`, which is ascending.

    Raises FloatingPointError as `StepTimer.check`.
    """
    device = precision.device
    reset_peak_memory(device)
    before = 0 if device.type == "cuda" else peak_memory(device)
    timer, peaks = StepTimer(config, precision), {}
    for count in counts:
        timer.step(0, count, by_part=False)  # allocates what lasts: gradients, moments, tables
        timer.check()
        reset_peak_memory(device)
        for number in range(warmup):
            timer.step(number, count, by_part=False)
        peaks[count] = peak_memory(device) - before
        timer.step(0, count, by_part=True)

    repeats = max(repeats, config.train.ema_update_every)
    whole: dict[int, list[float]] = {count: [] for count in counts}
    parts: dict[int, list[dict[Part, float]]] = {count: [] for count in counts}
    for number in range(repeats):
        for count in counts:
            whole[count].append(sum(timer.step(number, count, by_part=False).values()))
            parts[count].append(timer.step(number, count, by_part=True))
    timer.check()
    return [_row(timer, count, whole[count], parts[count], peaks[count]) for count in counts]


def _row(timer: StepTimer, count: int, whole: list[float], steps: list[dict[Part, float]], peak: int) -> dict:
    def typical(part: Part) -> float:
        return timer.per_step([step.get(part, 0.0) for step in steps])

    backward = {name: typical(Part(name, BACKWARD)) for name in PARTS}
    total = {name: typical(Part(name)) + backward[name] for name in PARTS}
    step_ms, of_parts, batch_size = timer.per_step(whole), sum(total.values()), timer.config.train.batch_size
    low, _, high = statistics.quantiles(whole, n=4) if len(whole) > 1 else whole * 3
    return {
        "ratio": count / math.prod(timer.config.size),
        "points": count,
        "step_ms": step_ms,
        "step_ms_quartiles": [low, high],
        "sum_of_parts_ms": of_parts,
        "images_per_second": 1e3 * batch_size / step_ms,
        "peak_memory_bytes": peak,
        "repeats": len(whole),
        "parts": [
            {"part": name, "ms": total[name], "backward_ms": backward[name], "share": total[name] / of_parts}
            for name in PARTS
        ],
    }


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        counts = point_counts(config, FLAGS.ratios)
        path = Path(FLAGS.json) if FLAGS.json else None
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--json={path}: accepted: a file in a folder that exists")
        precision = Precision.create(pick_device(config.run.device), config.train.amp, config.train.amp_dtype)
        result = {"benchmark": "train_step", **circumstances(config, precision), "warmup": FLAGS.warmup}
        result["rows"] = measure(config, precision, counts, FLAGS.warmup, FLAGS.repeats)
        if path:
            write_json(path, result)
    print(step_table(result))


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main)
