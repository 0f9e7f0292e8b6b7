"""Blend one image into another, or one sample into another.

    python experiments/interpolate.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --input=two_faces/ --steps=9 --animation=apng

Without --seeds the first two images of --input, or of the split, are encoded: their latents are joined by a straight
line, and the noises that DDIM inversion finds for them by a great circle, so that the ends are the images themselves.
--noise=random takes one random noise for the whole way instead, which shows what the latents alone do. With --seeds=3,7
two samples are joined, which needs the latent run too:

    python experiments/interpolate.py --config configs/ffhq_256_config.py \\
        --latent_config configs/ffhq_latent_config.py --seeds=3,7

Writes sheet.png (the way in one row), every picture as PNG, result.json and, with --animation, the way there and back.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from PIL import Image

from configs.flags import Command, readable_errors
from configs.schema import ImageConfig, LatentConfig
from data.pixels import to_uint8
from diffusion.coordinates import Size
from experiments import edit_flags as edit
from generation.editing import lerp, slerp
from generation.folder import parse_seeds
from generation.infty_diff import InftyDiff, SamplingOptions
from generation.inputs import Inputs
from training.files import write_atomic
from training.run_dir import run_path

FLAGS = flags.FLAGS
edit.define_flags(2, "the pictures; default: the training size")
flags.DEFINE_string("seeds", None, "two seeds of samples to join, 3,7, instead of images; needs --latent_config")
flags.DEFINE_integer("steps", 9, "pictures of the way, both ends included", lower_bound=2)
flags.DEFINE_enum("noise", "code", ("code", "random"), "of images: joined stochastic codes, or one random noise")
flags.DEFINE_integer("seed", 0, "seed of the noise with --noise=random", lower_bound=0)
flags.DEFINE_enum("latents", "lerp", ("lerp", "slerp"), "join latents by a line or by a great circle")
flags.DEFINE_enum("animation", None, ("apng", "gif"), "write animation.png or animation.gif too")
flags.DEFINE_integer("frame_ms", 120, "duration of a picture in it", lower_bound=10)


def main(configs: dict[str, Any], overridden: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        sampling = edit.sampling_options()
        if sampling.sampler == "ddpm" or sampling.eta:
            raise ValueError(f"--sampler={sampling.sampler}, --eta={sampling.eta:g}: draws noise at every step, which "
                             "breaks the way; accepted: ddim or dpmpp, and 0")  # fmt: skip
        if (FLAGS.seeds is None) != ("latent_config" not in configs):
            raise ValueError("--seeds, --latent_config: accepted: both, or neither")
        model = edit.open_model(config, run_path(configs["latent_config"]) if FLAGS.seeds else None)
        size = edit.requested_size() or model.config.size
        if FLAGS.seeds:
            latents, noises, names = sampled_ends(model, size)
        else:
            inputs = edit.open_images(model, config, overridden["config"], size)
            latents, noises, names = encoded_ends(model, inputs, sampling)
        weights = torch.linspace(0, 1, FLAGS.steps)
        way = {"lerp": lerp, "slerp": slerp}[FLAGS.latents](*latents, weights)
        noise = slerp(*noises, weights)
        settings = {"ends": names, "size": list(size), "noise": FLAGS.noise, "latents": FLAGS.latents,
                    "seed": FLAGS.seed}  # fmt: skip
        results, pictures = edit.Results("interpolation", config, sampling, settings), []
        with edit.steps_bar(sampling, model, FLAGS.steps, "interpolating") as bar:
            for i in range(FLAGS.steps):
                decoded = model.decode(way[i : i + 1], noise[i : i + 1], sampling, callback=lambda *_: bar.update())
                pictures.append(decoded[0].cpu().clamp(-1, 1))
                results.save(f"{i:03d}", pictures[-1])
        results.show(torch.stack(pictures))
        results.finish(FLAGS.steps, [{"picture": f"{i:03d}.png"} for i in range(FLAGS.steps)])
        if FLAGS.animation:
            animate(results.folder, pictures)
    print(f"{FLAGS.steps} pictures from {names[0]} to {names[1]}: {results.folder}")


Ends = tuple[torch.Tensor, torch.Tensor, list[str]]  # latents (2, D), noises (2, C, H, W), names


def sampled_ends(model: InftyDiff, size: Size) -> Ends:
    """The two samples of --seeds."""
    seeds = parse_seeds(FLAGS.seeds)
    if len(seeds) != 2:
        raise ValueError(f"--seeds={FLAGS.seeds}: accepted: two different seeds, e.g. 3,7")
    return model.prior.sample(seeds), model.initial_noise(seeds, size), [f"seed {seed}" for seed in seeds]


def encoded_ends(model: InftyDiff, inputs: Inputs, sampling: SamplingOptions) -> Ends:
    """The first two images."""
    if len(inputs.images) < 2:
        raise ValueError(f"--input={FLAGS.input}, --num_images={FLAGS.num_images}: one image; accepted: two")
    images = inputs.images[:2]
    latents = model.encode(images)
    if FLAGS.noise == "code":
        return latents, model.encode_stochastic(images, latents, sampling.steps), inputs.names[:2]
    return latents, model.initial_noise([FLAGS.seed] * 2, tuple(images.shape[-2:])), inputs.names[:2]


def animate(folder: Path, pictures: list[torch.Tensor]) -> None:
    """Write the pictures (C, H, W), there and back, as one endless animation."""
    there = [Image.fromarray(to_uint8(p[:3].expand(3, -1, -1)).permute(1, 2, 0).contiguous().numpy()) for p in pictures]
    frames = there + there[-2:0:-1]
    kind, name = ("GIF", "animation.gif") if FLAGS.animation == "gif" else ("PNG", "animation.png")
    options = {"save_all": True, "append_images": frames[1:], "duration": FLAGS.frame_ms, "loop": 0}
    write_atomic(folder / name, lambda path: frames[0].save(path, format=kind, **options))


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig, "latent_config": LatentConfig}, optional=("latent_config",)).run(main)
