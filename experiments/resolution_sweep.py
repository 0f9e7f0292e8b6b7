"""Any resolution: the same functions at many sizes (Figure 2), and FID against steps and sizes (Figure 7).

    python experiments/resolution_sweep.py --config configs/ffhq_latent_config.py \\
        --config.run.experiment="ffhq_mollified_256_sampler" --decoder_config configs/ffhq_256_config.py \\
        --decoder_config.run.experiment="ffhq_mollified_256" --sizes=64,128,256,512,1024 --seeds=0-3

draws every seed at every size and puts the pictures together: above in proportion, below at one height.
With --figure=7 (and --decoder_config.data.root_dir=ffhq.zip, the reference) it draws --num_samples images for each of
--sizes and --steps, scores them and plots the result. --reference_at_size compares with the data at the size of the
samples, and --split=val with held-out data. --enlarged adds what simple enlargement would give: samples of the training
size, by Lanczos' filter. Both figures continue where they were. In --out_dir: the samples, and resolutions.png or
steps_and_resolutions.png, with JSON beside it.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from absl import flags
from PIL import Image

from configs.schema import ImageConfig, LatentConfig
from configs.validate import shown
from data.opening import read_json
from diffusion.coordinates import Size
from experiments.support.commands import (
    check_all_steps,
    define_scoring_flags,
    metric_name,
    require_extractor,
    sample,
    score,
)
from experiments.support.options import define, sampling_options, settings_name
from experiments.support.parsing import parse_seeds, parse_size
from experiments.support.plots import line_plot, require_matplotlib
from infty_diff.sampling import SamplingOptions
from metrics.evaluation import SCORES
from metrics.resize import by
from runtime.claimed import claim_folder, is_marked, open_png, save_png, whole_png
from runtime.command import Command, readable_errors
from runtime.files import write_json
from runtime.run_dir import run_path
from runtime.sheet import Row, save_sheet

FLAGS = flags.FLAGS
define_scoring_flags(num_samples=10_000)
flags.DEFINE_enum("figure", "2", ("2", "7"), "which figure of the paper")
flags.DEFINE_string("sizes", None, "sizes, 64,128 or 48x80,96x160; default: the training size times 1/4 (1/2) to 4 (2)")
define("saved_model", "seeds=0-3", "sampling_steps=100", "inv_snr", "out_dir", seeds=", of figure 2",
       sampling_steps=", of figure 2", out_dir="; default: resolution_sweep in the latent run")  # fmt: skip
flags.DEFINE_string("steps", "20,40,60,80,100", "numbers of sampling steps in figure 7")
flags.DEFINE_bool("reference_at_size", False, "score against the data at the size of the samples, not of training")
flags.DEFINE_bool("enlarged", False, "in figure 7, score enlarged samples of the training size too")
_FACTORS = {"2": (0.25, 0.5, 1, 2, 4), "7": (0.5, 1, 2)}


def main(command: Command, configs: dict[str, Any]) -> None:
    with readable_errors():
        sampling = sampling_options()
        train_size = configs["decoder_config"].size
        sizes = parse_sizes(FLAGS.sizes, train_size, _FACTORS[FLAGS.figure])
        out_dir = Path(FLAGS.out_dir) if FLAGS.out_dir else run_path(configs["config"]) / "resolution_sweep"
        model = [*command.arguments("config", "config", {}), *command.arguments("decoder_config", "decoder_config", {})]
        for name in ("steps", "enlarged"):
            if FLAGS.figure == "2" and FLAGS[name].present:
                raise ValueError(f"--{name} is {shown(FLAGS[name].value)}; accepted: with --figure=7")
        steps = [sampling.steps] if FLAGS.figure == "2" else [*map(str, parse_steps(FLAGS.steps))]
        check_all_steps(configs, steps)
        if FLAGS.figure == "2":
            figure, found = resolutions(model, sizes, train_size, sampling, out_dir)
        else:
            figure, found = steps_and_resolutions(command, model, sizes, train_size, sampling, out_dir)
        settings = {"sizes": [by(size) for size in sizes], "train_size": by(train_size)}
        settings |= {"inv_snr": sampling.inv_snr}
        write_json(figure.with_suffix(".json"), {**settings, **found})
    print(f"written: {figure} and {figure.with_suffix('.json').name}")


def resolutions(
    model: list[str], sizes: list[Size], train_size: Size, sampling: SamplingOptions, out_dir: Path
) -> tuple[Path, dict[str, Any]]:
    """Figure 2: draw every seed at every size, and put them together."""
    seeds, folders = parse_seeds(FLAGS.seeds), {}
    for size in sizes:
        folders[size] = out_dir / settings_name(size, sampling.steps, sampling.sampler)
        sample(folders[size], model, f"--seeds={FLAGS.seeds}", f"--sample_img_size={by(size)}",
               f"--sampling_steps={sampling.steps}", f"--inv_snr={sampling.inv_snr}")  # fmt: skip
    names = [f"{by(size)} (training)" if size == train_size else by(size) for size in sizes]
    framed = [i for i, size in enumerate(sizes) if size == train_size]
    pictures = [[open_png(folders[size] / f"{seed:06d}.png") for size in sizes] for seed in seeds]
    rows = [Row(pictures[0], f"seed {seeds[0]}, sizes in proportion", names, framed, true_sizes=True)]
    rows += [Row(row, f"seed {seed}", framed=framed) for seed, row in zip(seeds, pictures)]
    figure = out_dir / "resolutions.png"
    save_sheet(figure, rows, names)
    return figure, {"seeds": seeds, "sampling_steps": sampling.steps}


def steps_and_resolutions(
    command: Command,
    model: list[str],
    sizes: list[Size],
    train_size: Size,
    sampling: SamplingOptions,
    out_dir: Path,
) -> tuple[Path, dict[str, Any]]:
    """Figure 7: draw and score samples for every number of steps and every size, and plot the scores."""
    require_matplotlib()
    require_extractor()
    reports: dict[str, dict[int, dict[str, Any]]] = {}

    def add(line: str, steps: int, folder: Path, size: Size) -> None:
        reference, report = command.arguments("decoder_config", "config", {}), f"{folder.name}_fid.json"
        if FLAGS.reference_at_size:
            reference, report = [*reference, f"--reference_size={by(size)}"], f"{folder.name}_fid_at_size.json"
        reports.setdefault(line, {})[steps] = score(folder, out_dir / report, reference)

    for steps in parse_steps(FLAGS.steps):
        names = {size: f"{settings_name(size, str(steps), sampling.sampler)}_scored" for size in [train_size, *sizes]}
        for size in dict.fromkeys([*([train_size] if FLAGS.enlarged else []), *sizes]):
            folder = out_dir / names[size]
            sample(folder, model, f"--num_samples={FLAGS.num_samples}", f"--sample_img_size={by(size)}",
                   f"--sampling_steps={steps}", f"--inv_snr={sampling.inv_snr}")  # fmt: skip
            if size in sizes:
                add(by(size), steps, folder, size)
            if FLAGS.enlarged and size[0] * size[1] > train_size[0] * train_size[1]:
                large = folder.with_name(f"{folder.name}_enlarged")
                enlarge(out_dir / names[train_size], large, size)
                add(f"{by(size)} enlarged", steps, large, size)
    figure = out_dir / "steps_and_resolutions.png"
    label = f"{metric_name()} of {FLAGS.num_samples} samples"
    found = {
        name: {size: {steps: report[name] for steps, report in of_size.items()} for size, of_size in reports.items()}
        for name in SCORES
    }
    line_plot(figure, found["fid"], f"Sampling steps ({sampling.sampler})", label, "Size (pixels)")
    return figure, {"metric": metric_name(), "split": FLAGS.split, "num_samples": FLAGS.num_samples, **found}


def enlarge(samples: Path, out_dir: Path, size: Size) -> None:
    """Write the samples of a folder at a larger size (H, W), by Lanczos' filter; those that are there are kept."""
    manifest = read_json(samples / "manifest.json", dict, "the manifest of a folder of samples")
    mark = claim_folder(out_dir, "manifest.json", {"enlarged": manifest, "size": size})
    for path in sorted(samples.glob("[0-9]*.png")):
        found = whole_png(out_dir / path.name)
        if not found or not is_marked(found[1], mark):
            with open_png(path) as image:
                large = np.atleast_3d(np.asarray(image.resize(size[::-1], Image.Resampling.LANCZOS)))
            save_png(out_dir / path.name, torch.from_numpy(large.transpose(2, 0, 1).copy()), mark, {})


def parse_sizes(text: str | None, train_size: Size, factors: tuple[float, ...]) -> list[Size]:
    """The sizes of --sizes, or the training size times each factor."""
    if text:
        return list(dict.fromkeys(parse_size(part, "sizes") for part in text.split(",")))
    return [(round(train_size[0] * factor), round(train_size[1] * factor)) for factor in factors]


def parse_steps(text: str) -> list[int]:
    """ "20,40" -> ascending numbers of steps."""
    if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) and int(part) for part in text.split(",")):
        raise ValueError(f"--steps is {shown(text)}; accepted: numbers of steps, e.g. 20,40,60,80,100")
    return sorted({int(part) for part in text.split(",")})


if __name__ == "__main__":
    command = Command(__doc__, {"config": LatentConfig, "decoder_config": ImageConfig})
    command.run(lambda configs, _: main(command, configs))
