"""Encode images and decode them again: from random noise, and from the noise they were encoded to.

    python experiments/generate_recons.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --num_images=16 --lpips=alex

With random noise a reconstruction shows what the latent keeps. With the stochastic code, to which DDIM inversion leads
an image at the same steps, it shows what latent and noise keep together: nearly everything.

Writes every reconstruction as PNG, sheet.png (a row per image, of the first 16: the image, decoded from random noise,
decoded from its code), and result.json with PSNR, SSIM and, with --lpips, LPIPS of each and their means. Run
again, only what is missing is made.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig
from experiments.support import edit_flags as edit
from infty_diff.results import digest
from metrics.similarity import LPIPS_NETS, load_lpips
from runtime.command import Command, readable_errors

FLAGS = flags.FLAGS
edit.define_flags(8, "images and reconstructions; default: the training size")
flags.DEFINE_integer("seed", 0, "seed of the noise of the first image; later ones follow", lower_bound=0)
flags.DEFINE_bool("stochastic_codes", True, "decode from stochastic codes too")
flags.DEFINE_enum("lpips", None, tuple(LPIPS_NETS), "measure LPIPS with this backbone; default: not")
flags.DEFINE_string("lpips_weights", None, "torchvision's file of that backbone; default: torch's cache, or a download")


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        if FLAGS.stochastic_codes and (FLAGS.sampler != "ddim" or FLAGS.eta):
            raise ValueError(
                f"--sampler={FLAGS.sampler}, --eta={FLAGS.eta:g}: stochastic codes belong to DDIM without noise; "
                "accepted: ddim and 0, or --nostochastic_codes"
            )
        sampling = edit.sampling_options()
        distance = load_lpips(FLAGS.lpips, FLAGS.lpips_weights) if FLAGS.lpips else None
        model = edit.open_model(config, sampling)
        inputs = edit.open_images(model, edit.requested_size() or model.config.size)
        size = tuple(inputs.images.shape[-2:])
        settings = {"size": list(size), "seed": FLAGS.seed, "lpips": FLAGS.lpips, "lpips_weights": FLAGS.lpips_weights}
        results = edit.open_results("recons", config, model, sampling, settings)
        ways = ("random", "code") if FLAGS.stochastic_codes else ("random",)
        names = {(i, way): f"{inputs.stem(i)}_{way}" for i in range(len(inputs.images)) for way in ways}
        missing = [key for key, name in names.items() if results.lacks(name, digest(inputs.images[key[0]]))]
        steps = sum(edit.step_count(model, sampling, encoded=way == "code") for _, way in missing)
        with edit.steps_bar(steps, "reconstructing") as bar:
            tick = lambda *_: bar.update()  # noqa: E731
            for i, way in missing:
                image, seeds = inputs.images[i : i + 1], [FLAGS.seed + i]
                latents = model.encode(image)
                if way == "code":
                    noise = model.encode_stochastic(image, latents, sampling.steps, callback=tick)
                else:
                    noise = model.initial_noise(seeds, size)
                step_noise = model.step_noise(seeds, size)
                decoded = model.decode(latents, noise, sampling, step_noise=step_noise, callback=tick)
                decoded = decoded.cpu().clamp(-1, 1)
                measures = edit.similarity(decoded, image, distance).items()
                row = {"image": inputs.names[i], **{f"{way}_{key}": value for key, value in measures}}
                results.add(names[i, way], digest(image[0]), decoded[0], row)
        for i, image in enumerate(inputs.images):
            results.show([image], [names[i, way] for way in ways])
        means = results.finish(1 + len(ways))
    print(f"{means}; {len(missing)} made, {len(names) - len(missing)} were there: {results.folder}")


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main)
