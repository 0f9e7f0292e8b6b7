"""How well held-out images are made finer, and holes in them filled: PSNR and Fréchet distance (Figures 8 and 9).

    python experiments/restoration.py --saved_model=landscapes-32 --sample_img_size=64 --num_images=500 \\
        --model=efficientnet_lite0

Held-out images of --sample_img_size are reduced by --factor and made finer again; and a box in their middle, of 3/8 of
the height and 5/12 of the width, is cut out and filled. Beside the methods of experiments/super_resolution.py and
experiments/inpaint.py stand bicubic interpolation, and the known pixels continued smoothly.

    PSNR      of all that was made, in decibel, the mean over images; in a hole of the hole alone
    measured  the same of what was given: of the result reduced again, of the known pixels before they are put back
    distance  the Fréchet distance of the results to the held-out images that follow; "truth" is that of the images

In --out_dir: a folder of pictures for each of --methods, table.txt, restoration.json and restoration.png. Run again,
only what is missing is made.
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from configs.schema import ImageConfig
from data.datasets import open_dataset
from data.pixels import to_pictures
from diffusion.conditioning import fill_hole
from diffusion.sensors import reduced
from experiments.support import editing as edit
from experiments.support.inputs import open_inputs
from experiments.support.options import between, define, requested_size, sampling_options
from experiments.support.results import Results, digest
from experiments.support.tables import aligned
from infty_diff.editing import InpaintOptions, enlarged
from infty_diff.model import InftyDiff
from infty_diff.sampling import SamplingOptions
from metrics.extractors import open_extractor
from metrics.features import Extraction, cached_features, features
from metrics.frechet import frechet_distance, gaussian_of
from metrics.images import DatasetImages, ImageFolder
from metrics.resize import by
from runtime.claimed import open_png
from runtime.command import Command, readable_errors
from runtime.files import write_atomic, write_json
from runtime.run_dir import run_path
from runtime.sheet import Row, save_sheet

FLAGS = flags.FLAGS
# Name -> what it does. The first of a task needs no model.
METHODS = {
    "finer_bicubic": "finer: bicubic interpolation",
    "finer_encoding": "finer: encoded and decoded",
    "finer_code": "finer: the same, from the code of DDIM",
    "finer_posterior": "finer: posterior mean",
    "hole_smooth": "hole: continued smoothly",
    "hole_guidance": "hole: reconstruction guidance",
    "hole_posterior": "hole: posterior mean",
}
define("saved_model", "sample_img_size", "sampling_steps", "sampler", "eta", "inv_snr", "run_weights", "out_dir",
       "model", "weights", "cache_dir", "seed", sample_img_size="; default: the training size",
       out_dir="; default: restoration-SIZE in the folder of the run")  # fmt: skip
flags.DEFINE_integer("num_images", 16, "held-out images, the first; at most half of them", **between(2, 10**7))
flags.DEFINE_float("factor", 2.0, "by which images are reduced", **between(1.0, 1024.0))
flags.DEFINE_list("methods", ",".join(METHODS), f"of {', '.join(METHODS)}")
_SHOWN = 6


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        for name in FLAGS.methods:
            if name not in METHODS:
                raise ValueError(f"--methods: {name!r} is none; accepted: {', '.join(METHODS)}")
        sampling = sampling_options()
        model = edit.open_model(config, sampling)
        size = requested_size() or model.config.size
        extractor = open_extractor(FLAGS.model, model.device, FLAGS.weights)
        data = model.config.data
        sized = replace(data, img_size=size[0], img_width=size[1], in_memory="never")
        count = len(open_dataset(sized, "val"))
        if count < 2 * FLAGS.num_images:
            raise ValueError(f"--num_images is {FLAGS.num_images}; accepted: at most half of the {count} held out")
        images = open_inputs(None, data, size, FLAGS.num_images).images
        out = Path(FLAGS.out_dir) if FLAGS.out_dir else run_path(config) / f"restoration-{by(size)}"
        settings = {"size": list(size), "factor": FLAGS.factor, "seed": FLAGS.seed, "sampling": asdict(sampling)}
        means = {name: make(name, model, images, sampling, settings, out / name) for name in FLAGS.methods}
        how = Extraction(threads=os.cpu_count() or 1, cache_dir=Path(FLAGS.cache_dir), device=model.device)
        held_out = DatasetImages(replace(config, data=sized), "val", extractor.channels)
        real = cached_features(held_out, extractor, how, title="held-out images")
        rest = gaussian_of(real[FLAGS.num_images :])
        rows = [{"method": "truth", "distance": frechet_distance(gaussian_of(real[: FLAGS.num_images]), rest)}]
        for name, mean in means.items():
            folder = ImageFolder(str(out / name), extractor.channels, "--out_dir", FLAGS.num_images)
            distance = frechet_distance(gaussian_of(features(folder, extractor, how, title=name)), rest)
            rows.append({"method": METHODS[name], **mean, "distance": distance})
        text = table(rows, extractor.metric, size)
        write_atomic(out / "table.txt", lambda path: path.write_text(text + "\n"))
        facts = {"images": FLAGS.num_images, "metric": extractor.metric, **model.provenance(sampling)}
        write_json(out / "restoration.json", {**settings, **facts, "rows": rows})
        show(out, images, size)
    print(f"{text}\nwritten: {out / 'table.txt'}, with .json and .png beside it")


def make(
    name: str,
    model: InftyDiff,
    images: torch.Tensor,
    sampling: SamplingOptions,
    settings: dict[str, Any],
    folder: Path,
) -> dict[str, float]:
    """Draw what is missing of a method's results; the means of what was measured."""
    results = Results(folder, {"method": name, **settings}, model.provenance(sampling))
    missing = [i for i, image in enumerate(images) if results.lacks(f"{i:06d}", digest(image))]
    with edit.steps_bar(len(missing), name) as bar:
        for i in missing:
            image = images[i : i + 1]
            made, error, misfit = restored(name, model, image, sampling, FLAGS.seed + i)
            row = {key: round(_decibel(e), 4) for key, e in (("psnr", error), ("measured", misfit))}
            results.add(f"{i:06d}", digest(image[0]), made[0], row)
            bar.update()
    for i, image in enumerate(images):
        results.show("", [image], [f"{i:06d}"])
    return results.finish(["image", METHODS[name]])


def restored(
    name: str, model: InftyDiff, image: torch.Tensor, sampling: SamplingOptions, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a method makes of an image (1, C, H, W), its squared errors where nothing was given, and where it was."""
    size, (task, _, method) = tuple(image.shape[-2:]), name.partition("_")
    if task == "finer":
        low = reduced(image, low_size(size)).clamp(-1, 1)
        last = model.process.schedule.num_steps - 1
        fine = {
            "bicubic": lambda: enlarged(low, size),
            "encoding": lambda: model.super_resolution(low, size, [seed], sampling),
            "code": lambda: model.super_resolution(low, size, [seed], sampling, last),
            "posterior": lambda: model.super_resolution(low, size, [seed], sampling, method="posterior"),
        }[method]()  # fmt: skip
        fine = fine.cpu().clamp(-1, 1)
        return fine, (fine - image).square(), (reduced(fine, low_size(size)) - low).square()
    known = hole(size)
    fill: Callable[[], torch.Tensor] = (
        (lambda: fill_hole(image, known)) if method == "smooth"
        else lambda: model.inpaint(image[0], known, [seed], InpaintOptions(sampling, method=method))
    )  # fmt: skip
    filled = fill().cpu().clamp(-1, 1)
    error = (filled - image).square()
    return torch.where(known, image, filled), error[..., ~known], error[..., known]


def low_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size that images are reduced to."""
    return round(size[0] / FLAGS.factor), round(size[1] / FLAGS.factor)


def hole(size: tuple[int, int]) -> torch.Tensor:
    """Which pixels are known, bool (H, W)."""
    known = torch.ones(size, dtype=torch.bool)
    known[size[0] // 4 : 5 * size[0] // 8, size[1] // 3 : 3 * size[1] // 4] = False
    return known


def _decibel(error: torch.Tensor) -> float:
    return 10 * math.log10(4 / max(float(error.mean()), 1e-12))


def show(out: Path, images: torch.Tensor, size: tuple[int, int]) -> None:
    """The first images, what was given of them, and what each method made: restoration.png."""
    images = images[:_SHOWN]
    given = {"finer": reduced(images, low_size(size)).clamp(-1, 1), "hole": torch.where(hole(size), images, -1.0)}
    rows = [Row(to_pictures(images), f"held-out images, {by(size)}")]
    for name in FLAGS.methods:
        task = name.partition("_")[0]
        if task in given:
            known = given.pop(task)
            rows.append(Row(to_pictures(known), f"{task}: what is given, {by(known.shape[-2:])}"))
        rows.append(Row([open_png(out / name / f"{i:06d}.png") for i in range(len(images))], METHODS[name]))
    save_sheet(out / "restoration.png", rows)


def table(rows: list[dict[str, Any]], metric: str, size: tuple[int, int]) -> str:
    """The means as aligned text."""
    shown = [[row["method"], *(f"{row[key]:.2f}" if key in row else "-" for key in ("psnr", "measured", "distance"))]
             for row in rows]  # fmt: skip
    head = f"{FLAGS.num_images} held-out images of {by(size)}; distance: {metric}"
    return f"{head}\n{aligned([['method', 'PSNR', 'measured', 'distance'], *shown])}"


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main)
