"""Show images at a higher resolution than they have (Figure 8).

    python experiments/super_resolution.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --input=photos.zip --factor=4

Images are reduced to --input_size, encoded, and sampled at --factor times that size, or at --sample_img_size. The
latent alone keeps what an image shows, not every detail of it. --ddim_encoding also keeps the details that the low
resolution has: sampling starts at --start_step from the encoding of the image by DDIM, with new noise for finer ones.
--method=posterior also holds results to what they must be, reduced again: slower, and the closest (docs/functions.md).

Writes every result as PNG, sheet.png (a row per image, of the first 16: low resolution, bicubic, ours), and result.json
with PSNR and SSIM of our results, reduced again, against the input. Run again, only what is missing is made.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig
from diffusion.sensors import reduced
from experiments.support import editing as edit
from experiments.support.options import between, define, requested_size, sampling_options
from experiments.support.parsing import parse_size, parse_step
from experiments.support.results import digest
from infty_diff.editing import SUPER_RESOLUTION, enlarged
from runtime.command import Command, readable_errors

FLAGS = flags.FLAGS
edit.define_flags(4, "--factor times --input_size")
flags.DEFINE_string("input_size", None, "size that images are reduced to before; default: the training size")
flags.DEFINE_float("factor", 4.0, "how many times --input_size the results are", **between(1.0, 1024.0))
define("seed")
edit.define_method(SUPER_RESOLUTION, "encode the image alone, or also hold results to it by the posterior mean")
flags.DEFINE_bool("ddim_encoding", False, "start from the encoding of the image by DDIM")
flags.DEFINE_string("start_step", None, "with it: step 0 … T-1, or fraction 0.0 … 1.0 of them; default: the last")


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        sampling = sampling_options()
        if FLAGS.start_step and not FLAGS.ddim_encoding:
            raise ValueError(f"--start_step is {FLAGS.start_step}; accepted: with --ddim_encoding")
        model = edit.open_model(config, sampling)
        low = parse_size(FLAGS.input_size, "input_size") if FLAGS.input_size else model.config.size
        size = requested_size() or tuple(round(n * FLAGS.factor) for n in low)
        if size[0] < low[0] or size[1] < low[1]:
            raise ValueError(f"--sample_img_size is {FLAGS.sample_img_size}; accepted: at least {low[0]}x{low[1]}")
        last = model.process.schedule.num_steps - 1
        start = parse_step(FLAGS.start_step or str(last), last + 1) if FLAGS.ddim_encoding else None
        inputs = edit.open_images(model, low)
        settings = {"input_size": list(low), "size": list(size), "seed": FLAGS.seed, "start_step": start}
        settings |= edit.method_setting()
        results = edit.open_results("super_resolution", config, model, sampling, settings)
        missing = [i for i, image in enumerate(inputs.images) if results.lacks(inputs.stem(i), digest(image))]
        steps = edit.step_count(model, sampling, start, encoded=FLAGS.ddim_encoding)
        with edit.steps_bar(steps * len(missing), "super-resolution") as bar:
            for i in missing:
                image, seeds = inputs.images[i], [FLAGS.seed + i]
                how = (sampling, start, lambda *_: bar.update(), FLAGS.method)
                fine = model.super_resolution(image, size, seeds, *how).cpu().clamp(-1, 1)
                row = {"image": inputs.names[i], **edit.similarity(reduced(fine, low).clamp(-1, 1), image[None])}
                results.add(inputs.stem(i), digest(image), fine[0], row)
        for i, image in enumerate(inputs.images):
            results.show(inputs.names[i], [image, *enlarged(image[None], size)], [inputs.stem(i)])
        means = results.finish(["low resolution", "bicubic", "ours"])
    ssim = f", SSIM {means['ssim']:.4f}" if "ssim" in means else ""
    print(f"PSNR {means['psnr']:.2f} dB{ssim} (reduced again, against the input)")
    print(edit.summary(results, len(missing), len(inputs.names), inputs))


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main, claims=True)
