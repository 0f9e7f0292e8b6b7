"""Time a training step of stage one, beside the step as published and a large matrix product.

    python benchmarks/train_step.py --config configs/tiny_config.py --ratios=1,0.5,0.25,0.125 --json=PATH

Everything takes turns in one process, so that drifts of the machine hit all alike; times are medians. Data are random
images in memory: reading images is not measured. The step is what `Trainer.train_step` takes, from an idle device to an
idle device. A step that updates the EMA weights counts once in train.ema_update_every.

    as published    benchmarks/published.py: the authors' computation with copies of the same networks. Both sides then
                    predict T ξ, whatever --config says; --nopublished times the configuration as it is
    rate            multiply-adds of convolutions and linear layers (attention and sparse convolutions are not counted),
                    times two, by the time of the step; beside it that of a 2048 × 2048 matrix product
    peak memory     of a step: allocated on a GPU; on a CPU the growth of the resident set
    parts           where one further step spends its time, by kind of operator, from PyTorch's profiler
"""

import dataclasses
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.live_tensors import LiveTensors
from benchmarks.published import PublishedStep
from benchmarks.report import circumstances, peak_memory, reset_peak_memory, step_table
from configs.schema import ImageConfig
from diffusion.random import Purpose, seed_global, stream
from runtime.command import Command, readable_errors
from runtime.files import write_json
from runtime.precision import Precision, pick_device
from runtime.run_dir import RunDir
from training.image_stage import ImageStage
from training.trainer import Trainer

FLAGS = flags.FLAGS
flags.DEFINE_string("ratios", None, "fractions of the grid seen, e.g. 1,0.5,0.25; default: mc_integral.q_sample points")
flags.DEFINE_integer(
    "repeats", 20, "timed steps of each kind; at least train.ema_update_every", lower_bound=1, upper_bound=10**6
)
flags.DEFINE_integer("warmup", 8, "steps before, for each ratio", lower_bound=1, upper_bound=10**6)
flags.DEFINE_bool("published", True, "time the step as published too")
flags.DEFINE_string("json", None, "file for the result; default: none, the table on standard output alone")

# Kinds of operators by what their names hold, first match; whatever is left is "other".
PARTS = {
    "convolutions": ("conv2d", "convolution", "cudnn"),
    "linear layers": ("addmm", "::mm", "::bmm", "gemm", "linear"),
    "attention": ("attention", "flash", "softmax"),
    "sparse convolutions": ("infty_diff::depthwise", "infty_diff_depthwise", "lattice_kernel"),
    "norms, GELU and products": ("norm", "gelu", "addcmul", "::mul", "::add", "infty_diff"),
    "dropout": ("bernoulli", "dropout"),
    "optimiser": ("adam", "lerp", "foreach"),
    "interpolation": ("embedding_bag", "index_select", "sort", "searchsorted", "gather", "scatter"),
}
_INPUT_SETS = 4  # batches taken in turn, so that no cache holds the data of the next step
_AS_PUBLISHED = {"model_mean_type": "mollified_epsilon", "final_estimate": "auto"}
_PRODUCT = 2048  # side of the matrices


class RandomImages:
    """An `ImageDataset` of uniform noise."""

    name, pixels = "random", None

    def __init__(self, count: int, channels: int, size: tuple[int, int]) -> None:
        self.count, self.channels, self.size = count, channels, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> torch.Tensor:
        generator = stream(0, Purpose.BENCHMARK, i)
        return torch.randint(0, 256, (self.channels, *self.size), dtype=torch.uint8, generator=generator)

    def fingerprint(self) -> str:
        return self.name


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
    seed_global(config.run.seed, Purpose.WEIGHTS)
    stage = ImageStage(config, images, images, precision)
    with tempfile.TemporaryDirectory() as empty:
        nowhere = dataclasses.replace(config, run=dataclasses.replace(config.run, root_dir=empty))
        return Trainer(config, stage, RunDir(nowhere, resume=False), precision)


class StepTimer:
    """Runs steps of one trainer at several numbers of points per image.

    config: a configuration; its number of points is not used. precision: device and autocast type.
    """

    def __init__(self, config: ImageConfig, precision: Precision) -> None:
        self.config, self.trainer, self.device = config, build_trainer(config, precision), precision.device
        images, batch_size = self.trainer.stage.train_set, config.train.batch_size
        self.batches = [
            torch.stack([images[first + i] for i in range(batch_size)]) for first in range(0, len(images), batch_size)
        ]
        if self.device.type == "cuda":
            self.batches = [batch.pin_memory() for batch in self.batches]

    def batch(self, number: int) -> torch.Tensor:
        return self.batches[number % len(self.batches)]

    def step(self, number: int, count: int) -> None:
        """Step `number` with `count` points per image."""
        integral = dataclasses.replace(self.config.mc_integral, q_sample=count)
        self.trainer.stage.config = dataclasses.replace(self.config, mc_integral=integral)
        self.trainer.step = number  # of which coordinates, times, noise and the update of the EMA weights follow
        self.trainer.train_step(self.batch(number))

    def milliseconds(self, call: Callable[[], object]) -> float:
        """From an idle device to an idle device."""
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def check(self) -> None:
        """Raises FloatingPointError unless the loss is finite and every parameter has a finite gradient.

        With a loss scaler gradients may overflow: it then lowers the scale.
        """
        may_overflow = self.trainer.scaler.is_enabled()
        loss = self.trainer.means.read()["loss"]
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

    def flops(self, count: int) -> int:
        """Those of convolutions and matrix products in a step."""
        with FlopCounterMode(display=False) as counter:
            self.step(0, count)
        return counter.get_total_flops()

    def tensor_bytes(self, count: int) -> int:
        """The most that tensors made in a step take together; parameters and what else lasts are not counted."""
        with LiveTensors() as live:
            self.step(0, count)
        return live.peak

    def parts(self, count: int) -> dict[str, float]:
        """Milliseconds of one step by kind of operator, the most first."""
        activity = ProfilerActivity.CUDA if self.device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as recorded:
            self.step(0, count)
            self._wait()
        spent: dict[str, float] = defaultdict(float)
        for event in recorded.key_averages():
            name = event.key.lower()
            part = next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")
            microseconds = event.self_device_time_total if self.device.type == "cuda" else event.self_cpu_time_total
            spent[part] += microseconds / 1e3
        return dict(sorted(spent.items(), key=lambda item: -item[1]))


def measure(
    config: ImageConfig, precision: Precision, counts: list[int], warmup: int, repeats: int, published: bool = True
) -> list[dict[str, Any]]:
    """One row of results for every number of points per image, in the order of `counts`, which is ascending.

    Raises FloatingPointError as `StepTimer.check`.
    """
    device = precision.device
    reset_peak_memory(device)
    before = 0 if device.type == "cuda" else peak_memory(device)
    timer, peaks = StepTimer(config, precision), {}
    for count in counts:
        timer.step(0, count)  # allocates what lasts: gradients, moments, tables
        timer.check()
        reset_peak_memory(device)
        for number in range(warmup):
            timer.step(number, count)
        peaks[count] = peak_memory(device) - before
    factors = torch.randn(2, _PRODUCT, _PRODUCT, device=device, dtype=precision.dtype or torch.float32)
    theirs = {count: PublishedStep(timer.trainer.stage, count) for count in counts if published}

    def calls(count: int, number: int) -> dict[str, Callable[[], object]]:
        ways = {"ours": lambda: timer.step(number, count), "product": lambda: factors[0] @ factors[1]}
        if published:
            ways["as published"] = lambda: theirs[count](timer.batch(number), number)
        return ways

    repeats = max(repeats, config.train.ema_update_every)
    times = {count: {name: [] for name in calls(count, 0)} for count in counts}
    for number in range(-min(warmup, 3), repeats):
        for count in counts:
            for name, call in calls(count, max(number, 0)).items():
                spent = timer.milliseconds(call)
                if number >= 0:
                    times[count][name].append(spent)
    timer.check()
    return [_row(timer, count, times[count], peaks[count]) for count in counts]


def _row(timer: StepTimer, count: int, times: dict[str, list[float]], peak: int) -> dict[str, Any]:
    step_ms, flops = timer.per_step(times["ours"]), timer.flops(count)
    low, _, high = statistics.quantiles(times["ours"], n=4) if len(times["ours"]) > 1 else times["ours"] * 3
    rate, product = flops / step_ms / 1e6, 2 * _PRODUCT**3 / statistics.median(times["product"]) / 1e6
    row = {
        "ratio": count / math.prod(timer.config.size),
        "points": count,
        "step_ms": step_ms,
        "step_ms_quartiles": [low, high],
        "images_per_second": 1e3 * timer.config.train.batch_size / step_ms,
        "peak_memory_bytes": peak,
        "tensor_bytes": timer.tensor_bytes(count),
        "repeats": len(times["ours"]),
        "gflop": flops / 1e9,
        "gflop_per_second": rate,
        "product_gflop_per_second": product,
        "parts": timer.parts(count),
    }
    if "as published" in times:
        published = timer.per_step(times["as published"])
        row |= {"published_ms": published, "speedup": published / step_ms}
    return row


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    if FLAGS.published:
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, **_AS_PUBLISHED))
    with readable_errors():
        counts = point_counts(config, FLAGS.ratios)
        path = Path(FLAGS.json) if FLAGS.json else None
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"--json is {path}; accepted: a file in a folder that exists")
        precision = Precision.create(pick_device(config.run.device), config.train.amp, config.train.amp_dtype)
        result = {"benchmark": "train_step", **circumstances(config, precision), "warmup": FLAGS.warmup}
        result["rows"] = measure(config, precision, counts, FLAGS.warmup, FLAGS.repeats, FLAGS.published)
        if path:
            write_json(path, result)
    print(step_table(result))


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, as_given=("config",)).run(main)
