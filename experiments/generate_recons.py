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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig
from experiments.support import editing as edit
from experiments.support.options import define, requested_size, sampling_options
from experiments.support.results import digest
from experiments.support.tables import aligned
from metrics.similarity import LPIPS_NETS, load_lpips
from runtime.command import Command, readable_errors

FLAGS = flags.FLAGS
edit.define_flags(8)
define("seed", "weights", weights=", of the backbone of --lpips")
flags.DEFINE_bool("stochastic_codes", True, "decode from stochastic codes too")
_WAYS = {"random": "random noise", "code": "its stochastic code"}
_TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
flags.DEFINE_enum("lpips", None, tuple(LPIPS_NETS), "measure LPIPS with this backbone; default: not")


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        if FLAGS.stochastic_codes and (FLAGS.sampler != "ddim" or FLAGS.eta):
            raise ValueError(
                f"--sampler is {FLAGS.sampler}, --eta is {FLAGS.eta:g}: stochastic codes belong to DDIM without noise; "
                "accepted: ddim and 0, or --nostochastic_codes"
            )
        sampling = sampling_options()
        distance = load_lpips(FLAGS.lpips, FLAGS.weights) if FLAGS.lpips else None
        model = edit.open_model(config, sampling)
        inputs = edit.open_images(model, requested_size() or model.config.size)
        size = tuple(inputs.images.shape[-2:])
        settings = {"size": list(size), "seed": FLAGS.seed, "lpips": FLAGS.lpips, "weights": FLAGS.weights}
        results = edit.open_results("generate_recons", config, model, sampling, settings)
        ways = list(_WAYS)[: 1 + FLAGS.stochastic_codes]
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
            results.show(inputs.names[i], [image], [names[i, way] for way in ways])
        means = results.finish(["image", *(f"from {_WAYS[way]}" for way in ways)])
    print(f"{table(means, ways)}\n{edit.summary(results, len(missing), len(names), inputs)}")


def table(means: dict[str, float], ways: Sequence[str]) -> str:
    """The means of what was measured, a line for each way of decoding."""
    measures = [name for name in ("psnr", "ssim", "lpips") if f"{ways[0]}_{name}" in means]
    lines = [["decoded from", *(_TITLES[name] for name in measures)]]
    lines += [[_WAYS[way], *(f"{means[f'{way}_{name}']:.4f}" for name in measures)] for way in ways]
    return aligned(lines)


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}).run(main, claims=True)
