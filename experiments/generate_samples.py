"""Draw a folder of images at any resolution from a trained autoencoder and latent model.

    python experiments/generate_samples.py --config configs/ffhq_latent_config.py \\
        --config.run.experiment="ffhq_mollified_256_sampler" --decoder_config configs/ffhq_256_config.py \\
        --decoder_config.run.experiment="ffhq_mollified_256" --sample_img_size=192x320 --seeds=0-99

Image 000007.png depends on seed 7 alone, and shows the same function at every size. Run again after an interruption,
only what is missing is drawn. Under torchrun every process draws its share.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig, LatentConfig
from diffusion.process import DiffusionProcess, Prediction
from infty_diff.filter_file import CALIBRATED, INV_SNR_HELP
from infty_diff.folder import FolderOptions, draw_folder, parse_seeds, parse_size
from infty_diff.model import SAMPLERS, InftyDiff, SamplingOptions
from runtime.command import Command, chosen_weights, define_weights_flags, readable_errors
from runtime.processes import Processes
from runtime.run_dir import run_path

FLAGS = flags.FLAGS
flags.DEFINE_string("sample_img_size", None, "side, or height x width as in 192x320; default: the training size")
flags.DEFINE_string("sampling_steps", None, "step subset: 100, ddim50, 10,15,20 or logsnr20; default: 100, dpmpp 20")
flags.DEFINE_string("latent_sampling_steps", None, "step subset of the latent model; default: all steps")
flags.DEFINE_integer("num_samples", None, "number of images, seeds 0 to N-1; default: data.fid_samples", lower_bound=1)
flags.DEFINE_string("seeds", None, "seeds instead of num_samples: 0-99 or 3,7,10-12")
flags.DEFINE_enum("sampler", "ddim", SAMPLERS, "sampler of the images")
flags.DEFINE_float("eta", 0.0, "noise of DDIM, 0 to 1")
flags.DEFINE_string("inv_snr", "0.05", INV_SNR_HELP)
define_weights_flags("config", "decoder_config")
flags.DEFINE_integer("sample_batch_size", 16, "images drawn together on a GPU", lower_bound=1)
flags.DEFINE_bool("save_raw", False, "keep the mollified images too, float32 .npy under raw/")
flags.DEFINE_string("out_dir", None, "folder of the samples; default: samples/SETTINGS in the latent run")

_NEWEST = ("newest", "newest")  # weights of both runs


def main(configs: dict[str, Any], _: dict[str, list[str]], processes: Processes) -> None:
    config: LatentConfig = configs["config"]
    latent_run, image_run = run_path(config), run_path(configs["decoder_config"])
    with readable_errors():
        sampling = SamplingOptions(FLAGS.sampling_steps, FLAGS.sampler, FLAGS.eta, FLAGS.inv_snr)
        seeds = parse_seeds(FLAGS.seeds) if FLAGS.seeds else list(range(FLAGS.num_samples or config.data.fid_samples))
        size = parse_size(FLAGS.sample_img_size) if FLAGS.sample_img_size else None
        given = configs["decoder_config"], config
        which = chosen_weights("decoder_config"), chosen_weights("config")
        model = InftyDiff.from_runs(image_run, latent_run, config.run.device, *given, *which)
        options = FolderOptions(
            size or model.config.size, sampling, FLAGS.latent_sampling_steps, FLAGS.sample_batch_size, FLAGS.save_raw
        )
        name = folder_name(options, model.process, which)
        out_dir = Path(FLAGS.out_dir) if FLAGS.out_dir else latent_run / "samples" / name
        drawn = draw_folder(model, out_dir, seeds, options, model.provenance(sampling), processes)
    if processes.is_first:
        print(f"{drawn} images drawn, {len(seeds) - drawn} were there: {out_dir}")


def folder_name(options: FolderOptions, process: DiffusionProcess, weights: tuple[str, str] = _NEWEST) -> str:
    """Name a folder of samples after its settings, e.g. 192x320_ddim100; weights: which of both runs."""
    sampling = options.sampling
    name = f"{options.size[0]}x{options.size[1]}_{sampling.sampler}{sampling.steps.replace(',', '-')}"
    name += f"_eta{sampling.eta:g}" if sampling.eta else ""
    name += "_calibrated" if sampling.inv_snr == CALIBRATED else ""
    name += f"_snr{sampling.inv_snr:g}" if sampling.inv_snr not in (CALIBRATED, SamplingOptions.inv_snr) else ""
    name += "_filter" if process.prediction is Prediction.X0 and not process.keep_sharp else ""
    name += "".join(f"_{which}" for which in weights) if weights != _NEWEST else ""
    return name + (f"_latent{options.latent_steps.replace(',', '-')}" if options.latent_steps else "")


if __name__ == "__main__":
    Command(__doc__, {"config": LatentConfig, "decoder_config": ImageConfig}).run_in_all(main)
