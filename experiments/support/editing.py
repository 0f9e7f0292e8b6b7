"""What the commands that edit given images have in common: flags, the model and its inputs, where results go."""

from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

import torch
from absl import flags
from tqdm import tqdm

from configs.schema import ImageConfig, LatentConfig
from diffusion.coordinates import Size
from experiments.support.inputs import Inputs, open_inputs
from experiments.support.opening import opened
from experiments.support.options import between, define
from experiments.support.results import Results, digest
from infty_diff.folder import check_steps, final_estimate
from infty_diff.model import InftyDiff
from infty_diff.sampling import SamplingOptions
from metrics.similarity import SSIM_WINDOW, PairDistance, psnr, ssim
from runtime.run_dir import run_path

FLAGS = flags.FLAGS


def define_flags(num_images: int | None, default_size: str = "the training size") -> None:
    """Flags of every such command; num_images: the default of --num_images, None for a command without it."""
    define_input_flags(num_images)
    define("sample_img_size", "sampling_steps", "sampler", "eta", "inv_snr", "run_weights", "out_dir",
           sample_img_size=f"; default: {default_size}",
           out_dir="; default: COMMAND/INPUT-DIGEST_OF_SETTINGS in the folder of the run")  # fmt: skip


def define_method(methods: tuple[str, ...], text: str) -> None:
    """--method; the first of `methods` is the default, and `text` says what each is."""
    flags.DEFINE_enum("method", methods[0], methods, text)


def method_setting() -> dict[str, str]:
    """What the settings of results say of --method; nothing of the default."""
    return {} if FLAGS.method == FLAGS["method"].default else {"method": FLAGS.method}


def define_input_flags(num_images: int | None) -> None:
    """Which model and which images are taken."""
    define("saved_model")
    flags.DEFINE_string("input", None, "image, or folder, zip or tar of images; default: --split of the data set")
    flags.DEFINE_enum("split", "val", ("train", "val"), "split of the data set, without --input")
    if num_images is not None:
        flags.DEFINE_integer("num_images", num_images, "take at most so many images", **between(1, 10**7))


def open_model(config: ImageConfig, sampling: SamplingOptions, latent: LatentConfig | None = None) -> InftyDiff:
    """As `opened`; the model must have the steps of `sampling` and its filter."""
    model = opened(config, latent)
    model.inverse_snr(sampling.inv_snr)
    check_steps(model.process, sampling.steps, "--sampling_steps")
    return model


def open_images(model: InftyDiff, size: Size, count: int | None = None) -> Inputs:
    """The first `count` images of the flags, by default --num_images, fitted to `size`."""
    return open_inputs(FLAGS.input, model.config.data, size, count or FLAGS.num_images, FLAGS.split)


def open_results(
    command: str,
    config: ImageConfig,
    model: InftyDiff,
    sampling: SamplingOptions,
    settings: dict[str, Any],
    source: str | None = None,
) -> Results:
    """The folder of the results of a command.

    Args:
        command: its name.
        config: of the run in whose folder results go by default.
        model: what makes them.
        settings: what the pictures depend on beside the model, the images and the flags common to all commands.
        source: what the pictures are made from, if not --input or --split.
    """
    name = source or (PurePath(FLAGS.input).stem if FLAGS.input else FLAGS.split)
    source = source or (str(Path(FLAGS.input).expanduser().resolve()) if FLAGS.input else f"split {FLAGS.split}")
    settings = {"input": source, "sampling": asdict(sampling), **settings} | final_estimate(model.process)
    known = model.provenance(sampling)
    default = f"{name.replace(' ', '_')}-{digest(settings, known)[:8]}"
    return Results(Path(FLAGS.out_dir) if FLAGS.out_dir else run_path(config) / command / default, settings, known)


def step_count(model: InftyDiff, sampling: SamplingOptions, start: int | None = None, *, encoded: bool = False) -> int:
    """Steps of one sampling from step `start` of the process as trained, and if `encoded` of the inversion to there."""
    schedule = model.process.respaced(sampling.steps).schedule
    level = schedule.num_steps - 1 if start is None else schedule.step_until(start)
    return level + 1 + (level if encoded else 0)


def steps_bar(steps: int, title: str) -> tqdm:
    """A bar over the steps of samplers and of inversions; their callback `bar.update()` moves it."""
    return tqdm(total=steps, desc=title, unit="step", disable=None)


def similarity(a: torch.Tensor, b: torch.Tensor, lpips: PairDistance | None = None) -> dict[str, float]:
    """PSNR, SSIM where the images are large enough for it, and LPIPS if wanted, of one pair (1, C, H, W)."""
    measures = {"psnr": psnr(a, b)}
    if min(a.shape[-2:]) >= SSIM_WINDOW:
        measures["ssim"] = ssim(a, b)
    if lpips is not None:
        measures["lpips"] = lpips(a, b)
    return {name: round(float(value), 4) for name, value in measures.items()}


def summary(results: Results, made: int, wanted: int, inputs: Inputs) -> str:
    """The last lines of a command: what was made, what was there, where it is, and how many images there are."""
    lines = [f"{made} made, {wanted - made} were there: {results.folder}"]
    if inputs.total > len(inputs.names):
        lines.append(f"{len(inputs.names)} of {inputs.total} images; --num_images={inputs.total} for all")
    return "\n".join(lines)
