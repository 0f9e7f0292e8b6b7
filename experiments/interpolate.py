"""Blend one image into another, or one sample into another.

    python experiments/interpolate.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --input=two_faces/ --steps=9 --animation=apng

Without --seeds the first two images of --input, or of the split, are encoded: their latents are joined by a straight
line, and the noises that DDIM inversion finds for them by a great circle, so that the ends are the images themselves.
--noise=random takes one random noise for the whole way instead, which shows what the latents alone do. With --seeds=3,7
two samples are joined; configurations are then given as for sampling:

    python experiments/interpolate.py --config configs/ffhq_latent_config.py \\
        --decoder_config configs/ffhq_256_config.py --seeds=3,7

Writes every picture as PNG, sheet.png (the way in one row), result.json and, with --animation, the way there and back.
Run again, only what is missing is made.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from PIL import Image

from configs.schema import ImageConfig
from diffusion.coordinates import Size
from diffusion.samplers import Callback
from experiments.support import edit_flags as edit
from experiments.support.inputs import Inputs
from infty_diff.editing import lerp, slerp
from infty_diff.folder import parse_seeds
from infty_diff.model import InftyDiff, SamplingOptions
from infty_diff.results import digest
from runtime.command import Command, define_weights_flags, readable_errors, stages
from runtime.files import write_atomic
from runtime.run_dir import run_path

FLAGS = flags.FLAGS
edit.define_flags(2, "the pictures; default: the training size")
define_weights_flags("decoder_config")
flags.DEFINE_string("seeds", None, "two seeds of samples to join, 3,7, instead of images; with --decoder_config")
flags.DEFINE_integer("steps", 9, "pictures of the way, both ends included", lower_bound=2)
flags.DEFINE_enum("noise", "code", ("code", "random"), "of images: joined stochastic codes, or one random noise")
flags.DEFINE_integer("seed", 0, "seed of the noise with --noise=random", lower_bound=0)
flags.DEFINE_enum("latents", "lerp", ("lerp", "slerp"), "join latents by a line or by a great circle")
flags.DEFINE_enum("animation", None, ("apng", "gif"), "write animation.png or animation.gif too")
flags.DEFINE_integer("frame_ms", 120, "duration of a picture in it", lower_bound=10)


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    image = "decoder_config" if "decoder_config" in configs else "config"
    config: ImageConfig = configs[image]
    latent = configs["config"] if image != "config" else None
    latent_run = run_path(latent) if latent else None
    with readable_errors():
        sampling = edit.sampling_options()
        if sampling.sampler == "ddpm" or sampling.eta:
            raise ValueError(f"--sampler={sampling.sampler}, --eta={sampling.eta:g}: draws noise at every step, which "
                             "breaks the way; accepted: ddim or dpmpp, and 0")  # fmt: skip
        if (FLAGS.seeds is None) != (latent_run is None):
            raise ValueError("--seeds, --decoder_config: accepted: both, with --config of the sampler, or neither")
        model = edit.open_model(config, sampling, latent)
        size = edit.requested_size() or model.config.size
        inputs = None if FLAGS.seeds else two_images(edit.open_images(model, size))
        names = [f"seed {seed}" for seed in two_seeds()] if inputs is None else inputs.names[:2]
        made_from = digest(names) if inputs is None else digest(inputs.images[:2])
        settings = {"ends": names, "size": list(size), "steps": FLAGS.steps, "noise": FLAGS.noise,
                    "latents": FLAGS.latents, "seed": FLAGS.seed}  # fmt: skip
        results = edit.open_results("interpolation", config, model, sampling, settings)
        pictures = [f"{i:03d}" for i in range(FLAGS.steps)]
        missing = [i for i, picture in enumerate(pictures) if results.lacks(picture, made_from)]
        encoded = inputs is not None and FLAGS.noise == "code" and bool(missing)
        steps = len(missing) * edit.step_count(model, sampling)
        steps += encoded * (edit.step_count(model, sampling, encoded=True) - edit.step_count(model, sampling))
        with edit.steps_bar(steps, "interpolating") as bar:
            tick = lambda *_: bar.update()  # noqa: E731
            if missing:
                latents, noises = (
                    sampled_ends(model, size) if inputs is None else encoded_ends(model, inputs, sampling, tick)
                )
                weights = torch.linspace(0, 1, FLAGS.steps)
                way, noise = {"lerp": lerp, "slerp": slerp}[FLAGS.latents](*latents, weights), slerp(*noises, weights)
            for i in missing:
                decoded = model.decode(way[i : i + 1], noise[i : i + 1], sampling, callback=tick)
                results.add(pictures[i], made_from, decoded[0].cpu().clamp(-1, 1), {"weight": float(weights[i])})
        results.show([], pictures)
        results.finish(FLAGS.steps)
        if FLAGS.animation:
            animate(results.folder, pictures)
    print(f"{FLAGS.steps} pictures from {names[0]} to {names[1]}; {len(missing)} made, "
          f"{FLAGS.steps - len(missing)} were there: {results.folder}")  # fmt: skip


Ends = tuple[torch.Tensor, torch.Tensor]  # latents (2, D), noises (2, C, H, W)


def two_seeds() -> list[int]:
    """The seeds of --seeds."""
    seeds = parse_seeds(FLAGS.seeds)
    if len(seeds) != 2:
        raise ValueError(f"--seeds={FLAGS.seeds}: accepted: two different seeds, e.g. 3,7")
    return seeds


def two_images(inputs: Inputs) -> Inputs:
    """The images, of which there must be two."""
    if len(inputs.images) < 2:
        raise ValueError(f"--input={FLAGS.input}, --num_images={FLAGS.num_images}: one image; accepted: two")
    return inputs


def sampled_ends(model: InftyDiff, size: Size) -> Ends:
    """The two samples of --seeds."""
    seeds = two_seeds()
    return model.prior.sample(seeds), model.initial_noise(seeds, size)


def encoded_ends(model: InftyDiff, inputs: Inputs, sampling: SamplingOptions, callback: Callback) -> Ends:
    """The first two images."""
    images = inputs.images[:2]
    latents = model.encode(images)
    if FLAGS.noise == "code":
        return latents, model.encode_stochastic(images, latents, sampling.steps, callback=callback)
    return latents, model.initial_noise([FLAGS.seed] * 2, tuple(images.shape[-2:]))


def animate(folder: Path, pictures: list[str]) -> None:
    """Write the pictures, there and back, as one endless animation."""
    there = [Image.open(folder / f"{picture}.png").convert("RGB") for picture in pictures]
    frames = there + there[-2:0:-1]
    kind, name = ("GIF", "animation.gif") if FLAGS.animation == "gif" else ("PNG", "animation.png")
    options = {"save_all": True, "append_images": frames[1:], "duration": FLAGS.frame_ms, "loop": 0}
    write_atomic(folder / name, lambda path: frames[0].save(path, format=kind, **options))


if __name__ == "__main__":
    Command(__doc__, stages(sys.argv)).run(main)
