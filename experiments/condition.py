"""Draw functions given what sensors measure of them: points, averages over rectangles, or known pixels.

    python experiments/condition.py --config configs/ffhq_256_config.py --config.run.experiment="ffhq_mollified_256" \\
        --sensors=stations.csv --sd=0.02 --seeds=0-15

--sensors is a table with a header: y and x from 0 to 1, y downwards, and value, or value1, value2, value3 for channels.
An empty value is not measured. sd, height and width may be given too: the standard deviation of a sensor's error, and
the sides of the rectangle over which it averages. Values are those of images in [-1, 1]; of a model of fields they, sd
and --sd have the units of its data. The same arrays may be in an
.npz, with value (P, C). In an image that is transparent where nothing is known, every other pixel is a sensor.

Sensors measure the smooth function T x_0, or with --sharp the image x_0. By default latents are those of a smooth
surface through the measurements, one for all seeds. --latents=prior draws them, with --config of the sampler and
--decoder_config as in generate_samples.py. It wants some --rounds, in which images and latents are drawn in turn.

Writes for each seed 000007.png and raw/000007.npy, float32 (C, H, W), what sensors measure, of fields in their units;
mean.npy and sd.npy over the seeds, and both as pictures; sheet.png with the sensors marked; result.json. Run again,
only what is missing is made.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags

from configs.schema import ImageConfig
from data.field_pictures import field_picture
from data.units import FieldUnits
from diffusion.samplers import LastEstimate
from experiments.support import editing as edit
from experiments.support.options import between, define, requested_size, require_run_of_weights, sampling_options
from experiments.support.parsing import parse_seeds
from experiments.support.results import digest
from experiments.support.sensors import moments, of_first_channel, read_sensors, with_sensors
from infty_diff.folder import check_steps, is_whole_npy, orientation, save_npy
from infty_diff.posterior import LATENTS
from runtime.command import Command, readable_errors, stages

FLAGS = flags.FLAGS
define("saved_model", "seeds=0-7", "sample_img_size", "sampling_steps", "latent_sampling_steps", "sampler", "eta",
       "inv_snr", "run_weights", "decoder_run_weights", "out_dir", sample_img_size="; default: the training size",
       out_dir="; default: condition/SENSORS-DIGEST_OF_SETTINGS in the folder of the run")  # fmt: skip
flags.DEFINE_string("sensors", None, "table .csv, arrays .npz, or image that is transparent where nothing is known")
flags.DEFINE_float("sd", 0.01, "standard deviation of errors, where --sensors says nothing", **between(0.0, 100.0))
flags.DEFINE_bool("sharp", False, "sensors measure the image x_0, not the smooth function T x_0")
flags.DEFINE_enum("latents", "sensors", LATENTS, "latents of the measurements, or drawn from the sampler")
flags.DEFINE_integer("rounds", 1, "draw images and latents so often in turn", **between(1, 1000))
_PER_ROW = 8  # samples of the sheet


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    image = "decoder_config" if "decoder_config" in configs else "config"
    config: ImageConfig = configs[image]
    latent = configs["config"] if image != "config" else None
    with readable_errors():
        sampling, seeds = sampling_options(), parse_seeds(FLAGS.seeds)
        if FLAGS.sensors is None:
            raise ValueError("--sensors is missing; accepted: a file")
        if (FLAGS.latents == "prior") != (latent is not None):
            raise ValueError(f"--latents is {FLAGS.latents}; accepted: prior, with --decoder_config or --saved_model, "
                             "or sensors without --decoder_config")  # fmt: skip
        if FLAGS.latent_sampling_steps and not latent:
            raise ValueError(
                f"--latent_sampling_steps is {FLAGS.latent_sampling_steps}; accepted: with --latents=prior"
            )
        require_run_of_weights("decoder_run_weights", latent)
        model = edit.open_model(config, sampling, latent)
        if latent and FLAGS.latent_sampling_steps:
            check_steps(model.prior.process, FLAGS.latent_sampling_steps, "--latent_sampling_steps")
        size = requested_size() or model.config.size
        sensors = read_sensors(FLAGS.sensors, model.channels, FLAGS.sd, model.units)
        made_from = digest(sensors.places, sensors.values, sensors.sd, sensors.sides)
        settings = {"sensors": made_from, "size": list(size), "sharp": FLAGS.sharp, "latents": FLAGS.latents,
                    "rounds": FLAGS.rounds, "latent_steps": FLAGS.latent_sampling_steps,
                    **orientation(model.config.data.origin)}  # fmt: skip
        results = edit.open_results("condition", config, model, sampling, settings, Path(FLAGS.sensors).stem)
        arrays = {f"{seed:06d}": results.folder / "raw" / f"{seed:06d}.npy" for seed in seeds}
        shape = (model.channels, *size)
        missing = []
        for seed, (name, path) in zip(seeds, arrays.items()):
            if results.lacks(name, made_from) or not is_whole_npy(path, shape, results.row(name).get("sha256")):
                missing.append(seed)
        observe, drawn = sensors.observer(model.device), settings["latents"]
        units, origin = model.units, model.config.data.origin
        with edit.steps_bar(FLAGS.rounds * len(missing) * edit.step_count(model, sampling), "conditioning") as bar:
            for seed in missing:
                last = LastEstimate(lambda *_: bar.update())
                how = {"sharp": FLAGS.sharp, "latents": drawn, "rounds": FLAGS.rounds, "callback": last}
                steps = FLAGS.latent_sampling_steps
                smooth = model.posterior(sensors, [seed], size, sampling, latent_steps=steps, deblur=False, **how)
                picture = model.sharpened(smooth, last.denoised, sampling.inv_snr)
                measured = picture if FLAGS.sharp else smooth
                missed = observe(measured)[0].cpu() - sensors.readings
                if units is not None:  # each row of H sums to one
                    missed = missed * observe(units.undo(torch.ones_like(measured), spread=True))[0].cpu()
                    picture, measured = units.undo(picture), units.undo(measured)
                sha256 = save_npy(arrays[f"{seed:06d}"], measured[0].cpu())
                row = {"seed": seed, "misfit": round(float(missed.square().mean().sqrt()), 6), "sha256": sha256}
                results.add(f"{seed:06d}", made_from, _drawn(picture[0].cpu(), units, origin), row)
        mean, sd = moments(list(arrays.values()), shape)
        for name, array in (("mean", mean), ("sd", sd)):
            save_npy(results.folder / f"{name}.npy", array)
        white = max(float(sd.square().mean(0).sqrt().max()), 1e-12)
        results.add("mean", made_from, _drawn(mean, units, origin), {"of": len(seeds)})
        below, marks = mean, sensors
        if units is None:
            spread = sd.square().mean(0, keepdim=True).sqrt() / white * 2 - 1
        else:
            spread = field_picture(sd, units, [(0.0, float(channel.max())) for channel in sd], origin)
            below, marks = units.apply(mean)[:1], of_first_channel(sensors)
        results.add("sd", made_from, spread, {"white": white})
        marked = [with_sensors(image, marks, size, origin) for image in (None, below)]
        largest = f"sd, white is {white:.2g}" if units is None else "sd"
        captions = ["sensors", "mean, sensors on it", "mean", largest]
        results.show(f"{len(sensors.readings)} measurements", marked, ["mean", "sd"], captions)
        some = list(arrays)[:_PER_ROW]
        results.show("samples", [], some, [f"seed {int(name)}" for name in some])
        misfit = results.finish()["misfit"]
    print(f"misfit {misfit:.4f} (root mean square over {len(sensors.readings)} measurements), mean sd {sd.mean():.4f}")
    print(f"{len(missing)} made, {len(seeds) - len(missing)} were there: {results.folder}")


def _drawn(image: torch.Tensor, units: FieldUnits | None, origin: str) -> torch.Tensor:
    """An image (C, H, W), or a field in its units with row 0 at `origin`, as `Results.add` takes it."""
    return image.clamp(-1, 1) if units is None else field_picture(image, units, origin=origin)


if __name__ == "__main__":
    Command(__doc__, stages(sys.argv, "--latents prior")).run(main, claims=True)
