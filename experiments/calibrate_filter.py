"""Fit the filter that undoes the mollifier to what a trained model makes of held-out images, frequency by frequency.

    python experiments/calibrate_filter.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --num_images=256 --sampling_steps=50

Images are encoded, decoded from random noise, and compared with themselves. At each frequency the best filter is a
Wiener filter with the ratio of errors to image there. The ratios are stored beside the weights, as
weights.filter.json, and --inv_snr=calibrated samples with them, at any size. The paper's constant stays the default.

By default a reconstruction shares with its image what the latent keeps, so that all other detail counts as error, and
the filter suppresses it. --start_step begins at a noisy state of the image instead, at that step or fraction of the
steps: the smaller, the more the errors are those of the network alone.
"""

import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from configs.schema import ImageConfig
from diffusion.calibration import InverseSnrFit
from diffusion.mollifier import InverseSnr, Mollifier
from experiments.support import editing as edit
from experiments.support.options import define, sampling_options
from experiments.support.parsing import parse_step
from infty_diff.filter_file import save_filter
from infty_diff.sampling import SamplingOptions
from runtime.command import Command, readable_errors

FLAGS = flags.FLAGS
edit.define_input_flags(256)
define("sampling_steps", "sampler", "eta", "seed", "sample_batch_size", "run_weights")
flags.DEFINE_string("start_step", None, "start at this noisy state of the images: 0 … T-1, or 0.0 … 1.0 of the steps")


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        sampling = replace(sampling_options(), inv_snr=SamplingOptions.inv_snr)  # of no effect here
        model = edit.open_model(config, sampling)
        size, mollifier = model.config.size, model.process.mollifier
        if model.process.gives_sharp:
            raise ValueError("--config predicts the image itself, to which no filter is applied; "
                             "accepted: a run with diffusion.final_estimate=filter, or another prediction")  # fmt: skip
        fit = InverseSnrFit(mollifier)
        start = parse_step(FLAGS.start_step, model.process.schedule.num_steps)
        images = edit.open_images(model, size).images
        process = model.process.respaced(sampling.steps)
        level = process.schedule.num_steps - 1 if start is None else process.schedule.step_until(start)
        parts = []
        with edit.steps_bar((level + 1) * -(-len(images) // FLAGS.sample_batch_size), "reconstructing") as bar:
            for first in range(0, len(images), FLAGS.sample_batch_size):
                some = images[first : first + FLAGS.sample_batch_size].to(model.device)
                seeds = range(FLAGS.seed + first, FLAGS.seed + first + len(some))
                state = model.initial_noise(seeds, size)
                if start is not None:
                    alpha_bar = float(process.schedule.alpha_bar[level])
                    state = math.sqrt(alpha_bar) * mollifier(some) + math.sqrt(1 - alpha_bar) * state
                decoded = model.decode(
                    model.encode(some), state, sampling, step_noise=model.step_noise(seeds, size), start=level,
                    deblur=False, callback=lambda *_: bar.update(),
                )  # fmt: skip
                parts.append(decoded.cpu())
        mollified = torch.cat(parts)
        fit.add(images, mollified)
        ratios = fit.result()
        facts = {
            "images": len(images), "sampling": asdict(sampling), "start_step": start, "seed": FLAGS.seed,
            "psnr": psnr(mollifier, ratios, images, mollified),
            "psnr_0.05": psnr(mollifier, InverseSnr(1.0, (0.05,)), images, mollified),
        }  # fmt: skip
        path = save_filter(model.files["image"], mollifier, ratios, facts)
    print(table(mollifier, ratios))
    print(f"PSNR of {len(images)} images, {facts['psnr_0.05']:.2f} dB with 0.05 and {facts['psnr']:.2f} dB calibrated")
    print(f"written: {path}")


def psnr(mollifier: Mollifier, ratios: InverseSnr, images: torch.Tensor, mollified: torch.Tensor) -> float:
    """Of all images together, in decibel, after the filter with these ratios."""
    error = (mollifier.inverse(mollified, ratios).clamp(-1, 1) - images).square().mean()
    return 10 * math.log10(4 / max(float(error), 1e-12))


def table(mollifier: Mollifier, ratios: InverseSnr) -> str:
    """Ratio and amplification by frequency; 1 is the finest wave at the training resolution."""
    lines = [f"{'frequency':>10}{'inv_snr':>10}{'amplified':>11}"]
    for i, ratio in enumerate(ratios.values):
        gain = math.exp(-0.5 * (math.pi * mollifier.sigma * i * ratios.spacing) ** 2)
        lines.append(f"{i * ratios.spacing:10.3f}{ratio:10.4f}{gain / (gain**2 + ratio**2):11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main)
