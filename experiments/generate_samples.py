"""Draw a folder of images at any resolution from a trained autoencoder and latent model.

    python experiments/generate_samples.py --config configs/ffhq_latent_config.py \\
        --config.run.experiment="ffhq_mollified_256_sampler" --decoder_config configs/ffhq_256_config.py \\
        --decoder_config.run.experiment="ffhq_mollified_256" --sample_img_size=192x320 --seeds=0-99

    python experiments/generate_samples.py --saved_model=landscapes-32 --sample_img_size=96x160 --seeds=0-7

Image 000007.png depends on seed 7 alone, and shows the same function at every size. Run again after an interruption,
only what is missing is drawn. Under torchrun every process draws its share.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig, LatentConfig
from experiments.support.commands import check_all_steps
from experiments.support.opening import opened
from experiments.support.options import define, folder_name, requested_size, sampling_options
from experiments.support.parsing import parse_seeds
from infty_diff.folder import FolderOptions, draw_folder
from runtime.command import Command, readable_errors
from runtime.processes import Processes
from runtime.run_dir import run_path

FLAGS = flags.FLAGS
define(
    "saved_model", "sample_img_size", "sampling_steps", "latent_sampling_steps", "num_samples", "seeds", "sampler",
    "eta", "inv_snr", "sample_batch_size", "run_weights", "decoder_run_weights", "out_dir",
    sample_img_size="; default: the training size",
    num_samples=", of seeds 0 to N-1; default: data.fid_samples",
    seeds="; instead of --num_samples",
    out_dir="; default: samples/SETTINGS in the latent run",
)  # fmt: skip
flags.DEFINE_bool("save_raw", False, "keep the mollified images too, float32 .npy under raw/")


def main(configs: dict[str, Any], _: dict[str, list[str]], processes: Processes) -> None:
    config: LatentConfig = configs["config"]
    with readable_errors():
        sampling, size = sampling_options(), requested_size()
        seeds = parse_seeds(FLAGS.seeds) if FLAGS.seeds else list(range(FLAGS.num_samples or config.data.fid_samples))
        check_all_steps(configs, [sampling.steps])
        model = opened(configs["decoder_config"], config)
        options = FolderOptions(
            size or model.config.size, sampling, FLAGS.latent_sampling_steps, FLAGS.sample_batch_size, FLAGS.save_raw
        )
        name = folder_name(options, model.process, (FLAGS.decoder_run_weights, FLAGS.run_weights))
        out_dir = Path(FLAGS.out_dir) if FLAGS.out_dir else run_path(config) / "samples" / name
        drawn = draw_folder(model, out_dir, seeds, options, model.provenance(sampling), processes)
    if processes.is_rank_0:
        print(f"{drawn} images drawn, {len(seeds) - drawn} were there: {out_dir}")


if __name__ == "__main__":
    Command(__doc__, {"config": LatentConfig, "decoder_config": ImageConfig}).run_in_all(main, claims=True)
