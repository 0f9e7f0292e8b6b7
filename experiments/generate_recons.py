"""Encode images and decode them again: from random noise, and from the noise they were encoded to.

    python experiments/generate_recons.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --num_images=16 --lpips=alex

With random noise a reconstruction shows what the latent keeps. With the stochastic code, to which DDIM inversion leads
an image at the same steps, it shows what latent and noise keep together: nearly everything.

Writes sheet.png (a row per image: the image, decoded from random noise, decoded from its code), every reconstruction as
PNG, and result.json with PSNR, SSIM and, with --lpips, LPIPS of each and their means.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.flags import Command, readable_errors
from configs.schema import ImageConfig
from experiments import edit_flags as edit
from metrics.similarity import LPIPS_NETS, load_lpips

FLAGS = flags.FLAGS
edit.define_flags(8, "images and reconstructions; default: the training size")
flags.DEFINE_integer("seed", 0, "seed of the noise of the first image; later ones follow", lower_bound=0)
flags.DEFINE_bool("stochastic_codes", True, "decode from stochastic codes too")
flags.DEFINE_enum("lpips", None, tuple(LPIPS_NETS), "measure LPIPS with this backbone; default: not")
flags.DEFINE_string("lpips_weights", None, "torchvision's file of that backbone; default: torch's cache, or a download")


def main(configs: dict[str, Any], overridden: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        if FLAGS.stochastic_codes and (FLAGS.sampler != "ddim" or FLAGS.eta):
            raise ValueError(
                f"--sampler={FLAGS.sampler}, --eta={FLAGS.eta:g}: stochastic codes belong to DDIM without noise; "
                "accepted: ddim and 0, or --nostochastic_codes"
            )
        sampling = edit.sampling_options()
        distance = load_lpips(FLAGS.lpips, FLAGS.lpips_weights) if FLAGS.lpips else None
        model = edit.open_model(config)
        inputs = edit.open_images(model, config, overridden["config"], edit.requested_size() or model.config.size)
        results = edit.Results("recons", config, sampling, {"size": list(inputs.images.shape[-2:]), "seed": FLAGS.seed})
        ways, rows = 1 + 2 * FLAGS.stochastic_codes, []
        with edit.steps_bar(sampling, model, ways * len(inputs.images), "reconstructing") as bar:
            for i, image in enumerate(inputs.images):
                tick = lambda *_: bar.update()  # noqa: E731
                latents, seeds, size = model.encode(image[None]), [FLAGS.seed + i], tuple(image.shape[-2:])
                noises = {"random": model.initial_noise(seeds, size)}
                if FLAGS.stochastic_codes:
                    noises["code"] = model.encode_stochastic(image[None], latents, sampling.steps, callback=tick)
                row: dict[str, Any] = {"image": inputs.names[i]}
                results.show(image[None])
                for name, noise in noises.items():
                    step_noise = model.step_noise(seeds, size)
                    decoded = model.decode(latents, noise, sampling, step_noise=step_noise, callback=tick)
                    decoded = decoded.cpu().clamp(-1, 1)
                    results.show(decoded)
                    results.save(f"{inputs.stem(i)}_{name}", decoded[0])
                    row |= {f"{name}_{key}": v for key, v in edit.similarity(decoded, image[None], distance).items()}
                rows.append(row)
        means = results.finish(1 + len(noises), rows)
    print(f"{means}; results: {results.folder}")


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main)
