"""Fill a hole in images, several times each (Figure 9).

    python experiments/inpaint.py --config configs/ffhq_256_config.py --config.run.experiment="ffhq_mollified_256" \\
        --input=face.png --box=96,96,64,64 --seeds=0-3

The hole is --box, in pixels of the working size, or the white part of --mask, a black and white image of the size of
the input. Where the opacity of --mask varies, the hole is what is transparent.
Reconstruction guidance of strength --guidance holds the rest; --method=posterior holds it better, slower, and without a
strength to choose (docs/functions.md). By default what is in the hole is never looked at: the
encoder gets exactly the visible pixels, which it can, and sampling starts from fresh noise there. With --see_hole, as
in the paper, latents and the state at step --start_step are encodings of the whole image, so that an earlier start step
gives a hole more like the original. Known pixels are put back at the end, unless --nopaste.

Writes every result as PNG, sheet.png (a row per image, of the first 16: the image, the image with its hole, the
results), and result.json. Run again, only what is missing is made.
"""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from configs.schema import ImageConfig
from diffusion.conditioning import check_mask
from experiments.support import editing as edit
from experiments.support.inputs import MASK, Inputs, read_mask
from experiments.support.options import between, define, requested_size, sampling_options
from experiments.support.parsing import parse_box, parse_seeds, parse_step
from experiments.support.results import digest
from infty_diff.editing import INPAINTING, InpaintOptions
from runtime.command import Command, readable_errors

FLAGS = flags.FLAGS
edit.define_flags(4)
flags.DEFINE_string("mask", None, f"image of the size of the input, {MASK}")
flags.DEFINE_string("box", None, "top,left,height,width of the unknown pixels, in pixels of the working size")
define("seeds=0-2")
edit.define_method(INPAINTING, "hold known pixels by reconstruction guidance, or by the posterior mean given them")
flags.DEFINE_float("guidance", None, "λ, 0 for none; default: 0.4, or 0.003 with --plain_guidance",
                   **between(0.0, 1e4))  # fmt: skip
flags.DEFINE_bool("plain_guidance", False, "guide by the gradient as the paper prints it")
flags.DEFINE_string("start_step", None, "t_s, a step 0 … T-1 or a fraction 0.0 … 1.0 of them; default: the last")
flags.DEFINE_bool("see_hole", False, "encode the whole image, what is in the hole included, as in the paper")
flags.DEFINE_bool("follow", False, "hold known pixels also to the path of DDIM inversion")
flags.DEFINE_bool("paste", True, "put the known pixels back into the results")


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        sampling, seeds = sampling_options(), parse_seeds(FLAGS.seeds)
        if (FLAGS.mask is None) == (FLAGS.box is None):
            raise ValueError("--mask, --box; accepted: exactly one of them")
        if FLAGS.see_hole and len(seeds) > 1 and not sampling.draws_noise:
            raise ValueError(
                f"--seeds is {FLAGS.seeds}: all equal with --see_hole; accepted: one seed, or --eta above 0"
            )
        model = edit.open_model(config, sampling)
        size = requested_size() or model.config.size
        start = parse_step(FLAGS.start_step, model.process.schedule.num_steps)
        how = (FLAGS.guidance, FLAGS.plain_guidance, start, FLAGS.see_hole, FLAGS.follow, FLAGS.method)
        options = InpaintOptions(sampling, *how)
        inputs = edit.open_images(model, size)
        masks = [hole(inputs, i) for i in range(len(inputs.images))]
        settings = {"size": list(size), "mask": FLAGS.mask, "box": FLAGS.box, "paste": FLAGS.paste, **asdict(options)}
        del settings["method"]
        settings |= edit.method_setting()
        results = edit.open_results("inpaint", config, model, sampling, settings)
        names = [[f"{inputs.stem(i)}_seed{seed}" for seed in seeds] for i in range(len(masks))]
        given = [digest(image, mask) for image, mask in zip(inputs.images, masks)]
        missing = [
            [seed for seed, name in zip(seeds, row) if results.lacks(name, given[i])] for i, row in enumerate(names)
        ]
        steps = edit.step_count(model, sampling, start, encoded=True)
        with edit.steps_bar(steps * sum(map(bool, missing)), "inpainting") as bar:
            for i, wanted in enumerate(missing):
                if wanted:
                    image, mask = inputs.images[i], masks[i]
                    filled = model.inpaint(image, mask, wanted, options, lambda *_: bar.update()).cpu().clamp(-1, 1)
                    for seed, picture in zip(wanted, filled):
                        row = {"image": inputs.names[i], "seed": seed, **fidelity(picture, image, mask)}
                        shown = torch.where(mask, image, picture) if FLAGS.paste else picture
                        results.add(f"{inputs.stem(i)}_seed{seed}", given[i], shown, row)
        for name, image, mask, row in zip(inputs.names, inputs.images, masks, names):
            results.show(name, [image, with_hole(image, mask)], row)
        means = results.finish(["image", "what is known", *(f"seed {seed}" for seed in seeds)])
    print(f"PSNR of known pixels {means['psnr_known']:.2f} dB, of the hole {means['psnr_hole']:.2f} dB "
          "(before known pixels are put back)")  # fmt: skip
    print(edit.summary(results, sum(map(len, missing)), len(masks) * len(seeds), inputs))


def hole(inputs: Inputs, i: int) -> torch.Tensor:
    """The known pixels of image i, by --box or --mask."""
    size = tuple(inputs.images.shape[-2:])
    known = parse_box(FLAGS.box, size) if FLAGS.box else read_mask(FLAGS.mask, inputs.own_sizes[i], size)
    try:
        check_mask(known, size)
    except ValueError as error:
        raise ValueError(
            f"--box is {FLAGS.box}: {error}" if FLAGS.box else f"--mask is {FLAGS.mask}: {error}, in an image {MASK}"
        ) from None
    return known


def with_hole(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The image (C, H, W) as RGBA, transparent where it is unknown."""
    alpha = image[3:] if len(image) == 4 else torch.ones_like(image[:1])
    return torch.cat([image[:3].expand(3, -1, -1), torch.where(mask, alpha, -1.0)])


def fidelity(result: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """PSNR in decibel, before known pixels are put back, over the known pixels and over the hole."""
    error = (result - image).square().mean(dim=0)
    return {name: round(10 * math.log10(4 / max(float(error[part].mean()), 1e-12)), 4)
            for name, part in (("psnr_known", mask), ("psnr_hole", ~mask))}  # fmt: skip


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main, claims=True)
