"""The whole path on the embedded procedural functions: train both stages, draw samples at three sizes, show them.

    python experiments/demo.py

Runs the three commands of the README with configs/tiny_config.py and leaves everything in demo/. Takes minutes on two
CPU cores; run again, it continues where it was. With --saved_model=landscapes-32, or another model of procedural
functions, nothing is trained, and everything is in demo/landscapes-32/.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from configs.schema import ImageConfig
from data.datasets import open_dataset
from data.pixels import to_float, to_pictures
from experiments.support.commands import run
from infty_diff.model import InftyDiff, SamplingOptions
from metrics.resize import by
from runtime.command import readable_errors
from runtime.processes import Processes
from runtime.saved import saved_config, saved_files
from runtime.sheet import Row, save_sheet

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo"
SIZES = ("32", "64", "48x80")
COLUMNS = 8
OPTIONS = SamplingOptions("ddim50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saved_model", help="draw with a trained model instead of training one")
    saved = parser.parse_args().saved_model
    if saved:
        with readable_errors():
            name, where = saved_config(saved, ImageConfig).run.experiment, saved_files(saved).image
        out, model = OUT / name, [f"--saved_model={saved}"]
    else:
        out, where = OUT, OUT / "tiny"
        latent = [f"--config={ROOT}/configs/tiny_latent_config.py", f"--config.run.root_dir={OUT}"]
        decoder = [f"--decoder_config={ROOT}/configs/tiny_config.py", f"--decoder_config.run.root_dir={OUT}"]
        run("train_inf_ae_diffusion.py", f"--config={ROOT}/configs/tiny_config.py", f"--config.run.root_dir={OUT}")
        run("train_latent_diffusion.py", *latent, *decoder)
        model = [*latent, *decoder]
    for size in SIZES:
        how = [f"--sample_img_size={size}", f"--seeds=0-{COLUMNS - 1}", f"--sampling_steps={OPTIONS.steps}"]
        run("experiments/generate_samples.py", *model, *how, f"--out_dir={out}/samples_{size}")
    save_sheet(out / "overview.png", overview(InftyDiff.from_runs(where, device="cpu"), out))
    print(f"\nLook at {out / 'overview.png'}: data, reconstructions, and the same samples at {', '.join(SIZES)}.")


def overview(model: InftyDiff, out: Path) -> list[Row]:
    """Data and reconstructions above, samples at every size below."""
    dataset = open_dataset(model.config.data, "val")
    images = to_float(torch.stack([dataset[i] for i in range(COLUMNS)]))
    noise = model.initial_noise(range(COLUMNS), model.config.size)
    reconstructions = model.decode(model.encode(images), noise, OPTIONS)
    rows = [Row(to_pictures(images), f"held-out functions, {by(model.config.size)}")]
    rows.append(Row(to_pictures(reconstructions), f"encoded and decoded, {by(model.config.size)}"))
    for size in SIZES:
        files = [out / f"samples_{size}" / f"{seed:06d}.png" for seed in range(COLUMNS)]
        pictures = [Image.open(file, formats=("PNG",)) for file in files]
        rows.append(Row(pictures, f"samples, seeds 0-{COLUMNS - 1}, {size}"))
    return rows


if __name__ == "__main__" and Processes.from_environment().is_rank_0:
    main()
