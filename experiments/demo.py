"""The whole path on the embedded procedural functions: train both stages, draw samples at three sizes, show them.

    python experiments/demo.py

Runs the three commands of the README with configs/tiny_config.py and leaves everything in demo/. Takes minutes on two
CPU cores; run again, it continues where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image, ImageDraw

from configs.schema import ImageConfig
from data.datasets import open_dataset
from data.pixels import to_float, to_uint8
from experiments.support.pipeline import run
from infty_diff.model import InftyDiff, SamplingOptions
from runtime.files import write_atomic
from runtime.processes import Processes

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo"
SIZES = ("32", "64", "48x80")
COLUMNS = 8
TILE = 96  # height of a shown picture in pixels
MARGIN = 8
# A model of two minutes has no use for the last, noisiest step nor for much sharpening.
OPTIONS = SamplingOptions("ddim50", inv_snr=0.2)
LABEL = 18


def main() -> None:
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
            f"--inv_snr={OPTIONS.inv_snr}",
            f"--out_dir={OUT}/samples_{size}",
        )
    write_atomic(OUT / "overview.png", lambda path: overview().save(path, format="png"))
    print(f"\nLook at {OUT / 'overview.png'}: data, reconstructions, and the same samples at {', '.join(SIZES)}.")


def overview() -> Image.Image:
    """One picture: data and reconstructions above, samples at every size below."""
    model = InftyDiff.from_runs(OUT / "tiny", device="cpu")
    images = held_out(model.config)
    noise = model.initial_noise(range(COLUMNS), model.config.size)
    reconstructions = model.decode(model.encode(images), noise, OPTIONS)
    rows = {"held-out functions, 32x32": pictures(images), "encoded and decoded, 32x32": pictures(reconstructions)}
    for size in SIZES:
        files = [OUT / f"samples_{size}" / f"{seed:06d}.png" for seed in range(COLUMNS)]
        rows[f"samples, seeds 0-{COLUMNS - 1}, {size}"] = [Image.open(file).convert("RGB") for file in files]
    return stacked(rows)


def held_out(config: ImageConfig) -> torch.Tensor:
    dataset = open_dataset(config.data, "val")
    return to_float(torch.stack([dataset[i] for i in range(COLUMNS)]))


def pictures(images: torch.Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [−1, 1] as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in to_uint8(images.cpu())]


def stacked(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows of pictures scaled to one height without smoothing, each under its label."""
    shown = {
        label: [p.resize((round(p.width * TILE / p.height), TILE), Image.Resampling.NEAREST) for p in row]
        for label, row in rows.items()
    }
    width = max(sum(p.width + MARGIN for p in row) for row in shown.values()) + MARGIN
    sheet = Image.new("RGB", (width, len(rows) * (TILE + LABEL + MARGIN) + MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for label, row in shown.items():
        draw.text((MARGIN, top), label, fill="black")
        left = MARGIN
        for picture in row:
            sheet.paste(picture, (left, top + LABEL))
            left += picture.width + MARGIN
        top += TILE + LABEL + MARGIN
    return sheet


if __name__ == "__main__" and Processes.from_environment().is_first:
    main()
