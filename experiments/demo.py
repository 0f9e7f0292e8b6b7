"""The whole path on the embedded procedural functions: train both stages, draw samples at three sizes, show them.

    python experiments/demo.py

Runs the three commands of the README with configs/tiny_config.py and leaves everything in demo/. Takes minutes on two
CPU cores; run again, it continues where it was.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from data.datasets import open_dataset
from data.pixels import to_float, to_pictures
from experiments.support.commands import run
from infty_diff.model import InftyDiff, SamplingOptions
from runtime.processes import Processes
from runtime.sheet import Row, save_sheet

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo"
SIZES = ("32", "64", "48x80")
COLUMNS = 8
OPTIONS = SamplingOptions("ddim50")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    latent = [f"--config={ROOT}/configs/tiny_latent_config.py", f"--config.run.root_dir={OUT}"]
    decoder = [f"--decoder_config={ROOT}/configs/tiny_config.py", f"--decoder_config.run.root_dir={OUT}"]
    run("train_inf_ae_diffusion.py", f"--config={ROOT}/configs/tiny_config.py", f"--config.run.root_dir={OUT}")
    run("train_latent_diffusion.py", *latent, *decoder)
    for size in SIZES:
        run(
            "experiments/generate_samples.py",
            *latent,
            *decoder,
            f"--sample_img_size={size}",
            f"--seeds=0-{COLUMNS - 1}",
            f"--sampling_steps={OPTIONS.steps}",
            f"--out_dir={OUT}/samples_{size}",
        )
    save_sheet(OUT / "overview.png", overview())
    print(f"\nLook at {OUT / 'overview.png'}: data, reconstructions, and the same samples at {', '.join(SIZES)}.")


def overview() -> list[Row]:
    """Data and reconstructions above, samples at every size below."""
    model = InftyDiff.from_runs(OUT / "tiny", device="cpu")
    dataset = open_dataset(model.config.data, "val")
    images = to_float(torch.stack([dataset[i] for i in range(COLUMNS)]))
    noise = model.initial_noise(range(COLUMNS), model.config.size)
    reconstructions = model.decode(model.encode(images), noise, OPTIONS)
    rows = [Row(to_pictures(images), "held-out functions, 32x32")]
    rows.append(Row(to_pictures(reconstructions), "encoded and decoded, 32x32"))
    for size in SIZES:
        files = [OUT / f"samples_{size}" / f"{seed:06d}.png" for seed in range(COLUMNS)]
        pictures = [Image.open(file, formats=("PNG",)) for file in files]
        rows.append(Row(pictures, f"samples, seeds 0-{COLUMNS - 1}, {size}"))
    return rows


if __name__ == "__main__" and Processes.from_environment().is_rank_0:
    main()
