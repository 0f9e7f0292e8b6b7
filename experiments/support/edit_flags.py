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
from infty_diff.filter_file import INV_SNR_HELP
from infty_diff.folder import check_steps, final_estimate, parse_size
from infty_diff.model import SAMPLERS, InftyDiff, SamplingOptions
from infty_diff.results import Results, digest
from metrics.similarity import SSIM_WINDOW, PairDistance, psnr, ssim
from runtime.command import chosen_weights, define_weights_flags
from runtime.run_dir import run_path

FLAGS = flags.FLAGS


def define_flags(num_images: int, size_help: str) -> None:
    """Flags of every such command; the size is of what `size_help` says."""
    define_input_flags(num_images)
    define_model_flags()
    flags.DEFINE_string("sample_img_size", None, f"side, or height x width as in 192x320, of {size_help}")
    flags.DEFINE_string("inv_snr", "0.05", INV_SNR_HELP)
    flags.DEFINE_string(
        "out_dir", None, "folder of the results; default: COMMAND/INPUT-DIGEST_OF_SETTINGS in the folder of the run"
    )


def define_input_flags(num_images: int) -> None:
    """Which images are taken."""
    flags.DEFINE_string("input", None, "image, folder or zip of images of any size; default: --split of the data set")
    flags.DEFINE_enum("split", "val", ("train", "val"), "split of the data set, without --input")
    flags.DEFINE_integer("num_images", num_images, "take at most so many images", lower_bound=1)


def define_model_flags() -> None:
    """Which weights the model has, and how it draws."""
    flags.DEFINE_string("sampling_steps", None, "step subset: 100, ddim50, 10,15,20, logsnr20; default: 100, dpmpp 20")
    flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "sampler")
    flags.DEFINE_float("eta", 0.0, "noise of DDIM, 0 to 1")
    define_weights_flags("config")


def sampling_options() -> SamplingOptions:
    """The options of the flags."""
    return SamplingOptions(FLAGS.sampling_steps, FLAGS.sampler, FLAGS.eta, FLAGS.inv_snr)


def requested_size() -> Size | None:
    """--sample_img_size, or None."""
    return parse_size(FLAGS.sample_img_size) if FLAGS.sample_img_size else None


def open_model(config: ImageConfig, sampling: SamplingOptions, latent: LatentConfig | None = None) -> InftyDiff:
    """The model of a run, which must have the steps of `sampling`; latent: of the sampler, where one is needed."""
    latent_run = run_path(latent) if latent else None
    which = [chosen_weights(name) for name in (("decoder_config", "config") if latent else ("config",))]
    model = InftyDiff.from_runs(run_path(config), latent_run, config.run.device, config, latent, *which)
    model.inverse_snr(sampling.inv_snr)
    check_steps(model.process, sampling.steps, "sampling_steps")
    return model


def open_images(model: InftyDiff, size: Size) -> Inputs:
    """The images of the flags, fitted to `size`."""
    return open_inputs(FLAGS.input, model.config.data, size, FLAGS.num_images, FLAGS.split)


def open_results(
    command: str, config: ImageConfig, model: InftyDiff, sampling: SamplingOptions, settings: dict[str, Any]
) -> Results:
    """The folder of the results of a command.

    Args:
        command: its name.
        config: of the run in whose folder results go by default.
        model: what makes them.
        settings: what the pictures depend on beside the model, the images and the flags common to all commands.
    """
    source = str(Path(FLAGS.input).expanduser().resolve()) if FLAGS.input else f"split {FLAGS.split}"
    settings = {"input": source, "sampling": asdict(sampling), **settings} | final_estimate(model.process)
    known = model.provenance(sampling)
    default = f"{PurePath(FLAGS.input).stem if FLAGS.input else FLAGS.split}-{digest(settings, known)[:8]}"
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
