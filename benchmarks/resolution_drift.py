"""How far samples of one seed drift apart between sizes, and what becomes of a constant there.

    python benchmarks/resolution_drift.py --json=benchmarks/results/resolution_drift.json
    python benchmarks/resolution_drift.py --quick

Two ways to take the networks from the training resolution to another, each with models of its own, trained with
configs/tiny_config.py from several seeds, predicting T ξ on mirrored images:

    published  kernels interpolated bilinearly to windows of whole pixels; the first K points at a node of the grid
    overlap    kernels averaged over the cells of the pixels; points tied at the K-th distance share its weight

Both have the coordinates of cell_centred. One latent and one noise function a seed give an image at every size. drift
is ‖a − b‖ / ‖b‖ of the mollified image a at a size and that at the training size b, the finer read at the pixels of
the coarser by its cosine series, over all seeds of images.

A constant through the first trained kernels of the denoiser is multiplied by a gain for each channel. inside, border
and thinned are root mean squares over pixels and channels of its difference from that at the training size, over the
gain inside: away from borders by half a kernel, nearer than that (from the training pixel that holds the pixel), and at
a random quarter of the points (from the gain inside; at the training size thinning alone).

The table has the means over the models; the file has the numbers of each.
"""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.report import machine
from configs.schema import ImageConfig
from configs.tiny_config import get_config
from configs.validate import freeze
from data.datasets import open_dataset
from data.pixels import to_float
from diffusion.coordinates import CONVENTIONS, Points, Size, points_to_image
from diffusion.random import Purpose, seed_global, stream
from diffusion.series import on_lattice
from diffusion.subsets import draw_points
from infty_diff.model import InftyDiff, SamplingOptions
from models.operators.sparse_conv.backend import kernel_window
from models.sparse_unet import SparseUNet
from runtime.files import write_json
from runtime.precision import Precision
from runtime.run_dir import RunDir
from training.image_stage import ImageStage
from training.trainer import Trainer

NAME, CPU = "cell_centred", torch.device("cpu")
WAYS = {"published": {"shares_ties": False, "overlaps_cells": False}, "overlap": {}}
SIZES = (16, 24, 32, 48, 64, 96, 128)
SEEDS = range(8)
COLUMNS = ("drift", "inside", "border", "thinned")


@contextlib.contextmanager
def way_of(name: str) -> Iterator[None]:
    """Let networks go between resolutions in one of `WAYS`."""
    with mock.patch.dict(CONVENTIONS, {NAME: dataclasses.replace(CONVENTIONS[NAME], **WAYS[name])}):
        yield


def tiny(steps: int, seed: int, root: str) -> ImageConfig:
    config = get_config()
    config.run.seed, config.data.random_flip = seed, True
    config.diffusion.model_mean_type = "mollified_epsilon"  # the published prediction, whose states are compared
    config.run.root_dir, config.run.device, config.model.coordinate_convention = root, "cpu", NAME
    config.train.steps = config.train.plot_samples_steps = config.train.checkpoint_steps = steps
    config.train.plot_graph_steps, config.train.plot_sampling_steps = steps, "2"
    return freeze(config, ImageConfig)


def trained(steps: int, seed: int) -> InftyDiff:
    """The tiny model after so many steps."""
    with tempfile.TemporaryDirectory() as root:
        config, precision = tiny(steps, seed, root), Precision(CPU, None)
        images = open_dataset(config.data, "train")
        seed_global(config.run.seed, Purpose.WEIGHTS)
        Trainer(config, ImageStage(config, images, images, precision), RunDir(config, resume=False), precision).run()
        return InftyDiff.from_runs(Path(root) / config.run.experiment, device="cpu")


def drifts(model: InftyDiff, sizes: list[int], steps: str) -> list[float]:
    """‖a − b‖ / ‖b‖ at every size."""
    side = model.config.size[0]
    images = open_dataset(model.config.data, "train")
    latents = model.encode(to_float(torch.stack([images[i] for i in SEEDS])))
    options = SamplingOptions(steps)

    def at(n: int) -> torch.Tensor:
        return model.decode(latents, model.initial_noise(SEEDS, (n, n)), options, deblur=False).double()

    reference, found = at(side), []
    for n in sizes:
        a, b = (on_lattice(x, (min(n, side), min(n, side))) for x in (at(n), reference))
        found.append(((a - b).square().mean() / b.square().mean()).sqrt().item())
    return found


@torch.no_grad()
def gains(network: SparseUNet, size: Size, points: Points | None = None) -> torch.Tensor:
    """What the first kernels make of a constant: (C, H, W), or (C, M) at some points."""
    kernel = network.down_blocks[0].kernel
    kernel_shape, span = kernel_window(kernel.shape[-1], size, network.train_size, network.convention)
    points = points or Points(size)
    plan = network.backend.plan(points, 1, kernel_shape, kernel.shape[-1], CPU, span)
    out = network.backend.conv(torch.ones(1, points.count, len(kernel)), kernel, plan, len(kernel))
    return points_to_image(out, size)[0] if points.is_full else out[0].T


def gain_changes(network: SparseUNet, sizes: list[int]) -> list[dict[str, float]]:
    """inside, border and thinned of the module's text at every size."""
    side, kernel_size = network.train_size[0], network.sparse_spec.kernel_size
    at_training = gains(network, network.train_size)
    inner = at_training[:, side // 2, side // 2]  # (C,)

    def relative(difference: torch.Tensor) -> float:
        return (difference.square().mean() / inner.square().mean()).sqrt().item()

    rows = []
    for n in sizes:
        centre = (torch.arange(n) + 0.5) * side / n  # in training pixels
        near = torch.minimum(centre, side - centre) < (kernel_size + max(side / n, 1)) / 2
        border, holder = near[:, None] | near, centre.long()
        difference = gains(network, (n, n)) - at_training[:, holder[:, None], holder]
        some = draw_points("uniform", stream(0, Purpose.BENCHMARK), 1, (n, n), n * n // 4, CPU)
        thinned = gains(network, (n, n), some) - inner[:, None]
        rows.append({"inside": relative(difference[:, ~border]), "border": relative(difference[:, border]),
                     "thinned": relative(thinned)})  # fmt: skip
    return rows


def measure(sizes: list[int], models: int, training_steps: int, sampling_steps: str) -> list[dict[str, Any]]:
    """One row per size; for each way the numbers of all models, by column."""
    rows: list[dict[str, Any]] = [{"size": n, **{way: {c: [] for c in COLUMNS} for way in WAYS}} for n in sizes]
    for seed in range(models):
        for way in WAYS:
            with way_of(way):
                model = trained(training_steps, seed)
                changes = gain_changes(model.denoiser, sizes)
                for row, drift, change in zip(rows, drifts(model, sizes, sampling_steps), changes, strict=True):
                    for column, number in {"drift": drift, **change}.items():
                        row[way][column].append(number)
    return rows


def table(result: dict[str, Any]) -> str:
    """The result as aligned text."""
    lines = [
        f"{result['device']}, torch {result['torch']}, {result['models']} models, {result['training_steps']} steps of "
        f"training at {result['train_size']}x{result['train_size']}, samplers of {result['sampling_steps']}, "
        f"{result['date']}, commit {result['commit']}",
        "",
        f"{'':<10}" + "".join(f"{way:^40}" for way in WAYS),
        f"{'size':<10}" + "".join(f"{column:>10}" for _ in WAYS for column in COLUMNS),
    ]
    for row in result["rows"]:
        size = "{0}x{0}".format(row["size"])
        means = [sum(row[way][column]) / len(row[way][column]) for way in WAYS for column in COLUMNS]
        lines.append(f"{size:<10}" + "".join(f"{mean:>10.2%}" for mean in means))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result; default: none, the table alone")
    parser.add_argument("--quick", action="store_true", help="a model after 5 steps of training, at three sizes")
    arguments = parser.parse_args()
    if arguments.json and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        parser.error(f"--json is {arguments.json}; accepted: a file in a folder that exists")
    quick = {"models": 1, "training_steps": 5, "sampling_steps": "ddim3"}
    settings = quick if arguments.quick else {"models": 4, "training_steps": 400, "sampling_steps": "ddim25"}
    result = {"benchmark": "resolution_drift", **machine(CPU), "train_size": get_config().data.img_size, **settings}
    result["rows"] = measure([16, 32, 48] if arguments.quick else list(SIZES), **settings)
    if arguments.json:
        write_json(arguments.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
