"""Blend one image into another, or one sample into another.

    python experiments/interpolate.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --input=two_faces/ --frames=9 --animation=apng

Without --seeds the first two images of --input, or of the split, are encoded: their latents are joined by a straight
line, and the noises that DDIM inversion finds for them by a great circle, so that the ends are the images themselves.
--noise=random takes one random noise for the whole way instead, which shows what the latents alone do. With --seeds=3,7
two samples are joined; configurations are then given as for sampling:

    python experiments/interpolate.py --config configs/ffhq_latent_config.py \\
        --decoder_config configs/ffhq_256_config.py --seeds=3,7

Writes every picture as PNG, sheet.png, result.json and, with --animation, the way there and back.
Run again, only what is missing is made.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from configs.schema import ImageConfig
from experiments.support import editing as edit
from experiments.support.options import between, define, requested_size, require_run_of_weights, sampling_options
from experiments.support.parsing import parse_seeds
from experiments.support.results import digest
from infty_diff.editing import require_no_noise
from runtime.claimed import open_png
from runtime.command import Command, readable_errors, stages
from runtime.files import write_atomic

FLAGS = flags.FLAGS
edit.define_flags(None)
define("seeds", "seed", "decoder_run_weights", seed=" (with --noise=random)",
       seeds="; here two, of samples to join instead of images, with --decoder_config")  # fmt: skip
flags.DEFINE_integer("frames", 9, "pictures of the way, both ends included", **between(2, 100_000))
flags.DEFINE_enum("noise", "code", ("code", "random"), "of images: joined stochastic codes, or one random noise")
flags.DEFINE_enum("latents", "lerp", ("lerp", "slerp"), "join latents by a line or by a great circle")
flags.DEFINE_enum("animation", None, ("apng", "gif"), "write animation.png or animation.gif too")
flags.DEFINE_integer("frame_ms", 120, "duration of a picture in it", **between(10, 60_000))
_PER_ROW = 12  # pictures of the sheet


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    image = "decoder_config" if "decoder_config" in configs else "config"
    config: ImageConfig = configs[image]
    latent = configs["config"] if image != "config" else None
    with readable_errors():
        sampling = sampling_options()
        require_no_noise(sampling)
        if (FLAGS.seeds is None) != (latent is None):
            raise ValueError("--seeds, --decoder_config; accepted: both, with --config of the sampler, or neither; "
                             "or --seeds with --saved_model")  # fmt: skip
        require_run_of_weights("decoder_run_weights", latent)
        model = edit.open_model(config, sampling, latent)
        size = requested_size() or model.config.size
        inputs = None if FLAGS.seeds else edit.open_images(model, size, count=2)
        if inputs is not None and len(inputs.names) < 2:
            raise ValueError(f"--input is {FLAGS.input}, which holds one image; accepted: two images")
        names = [f"seed {seed}" for seed in two_seeds()] if inputs is None else inputs.names
        made_from = digest(names) if inputs is None else digest(inputs.images)
        source = f"samples of {' and '.join(names)}" if inputs is None else None
        settings = {"ends": names, "size": list(size), "frames": FLAGS.frames, "noise": FLAGS.noise,
                    "latents": FLAGS.latents, "seed": FLAGS.seed}  # fmt: skip
        results = edit.open_results("interpolate", config, model, sampling, settings, source)
        pictures = [f"{i:03d}" for i in range(FLAGS.frames)]
        missing = [i for i, picture in enumerate(pictures) if results.lacks(picture, made_from)]
        encoded = inputs is not None and FLAGS.noise == "code" and bool(missing)
        steps = len(missing) * edit.step_count(model, sampling)
        steps += encoded * (edit.step_count(model, sampling, encoded=True) - edit.step_count(model, sampling))
        with edit.steps_bar(steps, "interpolating") as bar:
            weights = torch.linspace(0, 1, FLAGS.frames).tolist()

            def keep(i: int, image: torch.Tensor) -> None:
                row = {"weight": weights[missing[i]]}
                results.add(pictures[missing[i]], made_from, image.cpu().clamp(-1, 1), row)

            if missing:
                model.interpolate(
                    two_seeds() if inputs is None else inputs.images,
                    [weights[i] for i in missing],
                    sampling,
                    size=size,
                    noise=FLAGS.seed if FLAGS.noise == "random" else "code",
                    latents=FLAGS.latents,
                    done=keep,
                    callback=lambda *_: bar.update(),
                )
        for start in range(0, FLAGS.frames, _PER_ROW):
            label = "" if start else f"from {names[0]} to {names[1]}"
            some = slice(start, start + _PER_ROW)
            results.show(label, [], pictures[some], [f"{weight:.2f}" for weight in weights[some]])
        results.finish()
        if FLAGS.animation:
            animate(results.folder, pictures)
    print(f"{FLAGS.frames} pictures from {names[0]} to {names[1]}; {len(missing)} made, "
          f"{FLAGS.frames - len(missing)} were there: {results.folder}")  # fmt: skip


def two_seeds() -> list[int]:
    """The seeds of --seeds."""
    seeds = parse_seeds(FLAGS.seeds)
    if len(seeds) != 2:
        raise ValueError(f"--seeds is {FLAGS.seeds}; accepted: two different seeds, e.g. 3,7")
    return seeds


def animate(folder: Path, pictures: list[str]) -> None:
    """Write the pictures, there and back, as one endless animation."""
    there = [open_png(folder / f"{picture}.png").convert("RGB") for picture in pictures]
    frames = there + there[-2:0:-1]
    kind, name = ("GIF", "animation.gif") if FLAGS.animation == "gif" else ("PNG", "animation.png")
    options = {"save_all": True, "append_images": frames[1:], "duration": FLAGS.frame_ms, "loop": 0}
    write_atomic(folder / name, lambda path: frames[0].save(path, format=kind, **options))


if __name__ == "__main__":
    Command(__doc__, stages(sys.argv)).run(main, claims=True)
