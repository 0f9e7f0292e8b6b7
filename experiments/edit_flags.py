"""What the commands that edit given images have in common: flags, the model and its inputs, results as files."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from absl import flags
from tqdm import tqdm

from configs.schema import ImageConfig
from configs.stored import relocate
from data.pixels import to_uint8
from diffusion.coordinates import Size
from generation.folder import parse_size, save_png
from generation.infty_diff import SAMPLERS, WEIGHTS, InftyDiff, SamplingOptions
from generation.inputs import Inputs, open_inputs
from metrics.similarity import SSIM_WINDOW, PairDistance, psnr, ssim
from training.files import file_digest, write_json
from training.run_dir import run_path, save_grid

FLAGS = flags.FLAGS


def define_flags(num_images: int, size_help: str) -> None:
    """Flags of every such command; the size is of what `size_help` says."""
    flags.DEFINE_string("input", None, "image, folder or zip of images of any size; default: --split of the data set")
    flags.DEFINE_enum("split", "val", ("train", "val"), "split of the data set, without --input")
    flags.DEFINE_integer("num_images", num_images, "take at most so many images", lower_bound=1)
    flags.DEFINE_string("sample_img_size", None, f"side, or height x width as in 192x320, of {size_help}")
    flags.DEFINE_string("sampling_steps", None, "step subset: 100, ddim50, 10,15,20, logsnr20; default: 100, dpmpp 20")
    flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "sampler")
    flags.DEFINE_float("eta", 0.0, "noise of DDIM, 0 to 1")
    flags.DEFINE_float("inv_snr", 0.05, "inverse signal-to-noise ratio of the Wiener filter that undoes the mollifier")
    flags.DEFINE_string("out_dir", None, "folder of the results; default: a folder of the run, named after the command")


def sampling_options() -> SamplingOptions:
    """The options of the flags."""
    return SamplingOptions(FLAGS.sampling_steps, FLAGS.sampler, FLAGS.eta, FLAGS.inv_snr)


def requested_size() -> Size | None:
    """--sample_img_size, or None."""
    return parse_size(FLAGS.sample_img_size) if FLAGS.sample_img_size else None


def open_model(config: ImageConfig, latent_run: Path | None = None) -> InftyDiff:
    """The model of a run."""
    return InftyDiff.from_runs(run_path(config), latent_run, config.run.device)


def open_images(model: InftyDiff, config: ImageConfig, overridden: list[str], size: Size) -> Inputs:
    """The images of the flags, fitted to `size`."""
    data = relocate(model.config, config, overridden, str(run_path(config))).data
    return open_inputs(FLAGS.input, data, size, FLAGS.num_images, FLAGS.split)


class Results:
    """The folder of a command's results: pictures, `sheet.png`, and last `result.json`.

    name: of the command. settings: what the results depend on beside the model and the flags common to all commands.
    """

    def __init__(self, name: str, config: ImageConfig, sampling: SamplingOptions, settings: dict[str, Any]) -> None:
        self.folder = Path(FLAGS.out_dir) if FLAGS.out_dir else run_path(config) / name
        weights = file_digest(run_path(config) / WEIGHTS)
        self._report = {"input": FLAGS.input or f"split {FLAGS.split}", "image_run": weights,
                        "sampling": asdict(sampling), **settings}  # fmt: skip
        self._tiles: list[torch.Tensor] = []

    def save(self, name: str, image: torch.Tensor) -> None:
        """Write an image (C, H, W) in [−1, 1] as NAME.png."""
        save_png(self.folder / f"{name}.png", to_uint8(image.cpu()))

    def show(self, images: torch.Tensor) -> None:
        """Append images (N, C, H, W) to the sheet."""
        self._tiles.extend(images.float().cpu())

    def finish(self, per_row: int, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Write the sheet, and the report with a row of measures per result; return the means of the measures."""
        measures = {key: [row[key] for row in rows] for key, value in rows[0].items() if isinstance(value, float)}
        means = {key: round(sum(values) / len(values), 4) for key, values in measures.items()}
        save_grid(self.folder / "sheet.png", torch.stack(self._tiles), per_row)
        write_json(self.folder / "result.json", {**self._report, "mean": means, "results": rows})
        return means


def steps_bar(sampling: SamplingOptions, model: InftyDiff, rounds: int, title: str) -> tqdm:
    """A bar over the sampling steps of several rounds; `bar.update()` in a sampler's callback moves it."""
    total = rounds * model.process.respaced(sampling.steps).schedule.num_steps
    return tqdm(total=total, desc=title, unit="step", disable=None)


def similarity(a: torch.Tensor, b: torch.Tensor, lpips: PairDistance | None = None) -> dict[str, float]:
    """PSNR, SSIM where the images are large enough for it, and LPIPS if wanted, of one pair (1, C, H, W)."""
    measures = {"psnr": psnr(a, b)}
    if min(a.shape[-2:]) >= SSIM_WINDOW:
        measures["ssim"] = ssim(a, b)
    if lpips is not None:
        measures["lpips"] = lpips(a, b)
    return {name: round(float(value), 4) for name, value in measures.items()}
