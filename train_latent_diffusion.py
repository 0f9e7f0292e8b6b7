"""Stage two: train the latent diffusion model on the encodings of a trained autoencoder.

    python train_latent_diffusion.py --config configs/ffhq_latent_config.py \\
        --config.run.experiment="ffhq_mollified_256_sampler" --decoder_config configs/ffhq_256_config.py \\
        --decoder_config.run.experiment="ffhq_mollified_256" --decoder_config.data.root_dir=PATH

The autoencoder is rebuilt as its run stored it; `--decoder_config` says where the run and its images are. Encodings are
computed once and kept beside the autoencoder. --decoder_run_weights=best takes those of its weights that were best on
held-out images; samples are then drawn with the same flag. The same command continues an interrupted run.

On several GPUs: torchrun --standalone --nproc_per_node=8 train_latent_diffusion.py …, which share the encoding, and the
train.batch_size latents of each step. A run may be continued with another number of GPUs.
"""

from absl import flags

from configs.schema import ImageConfig, LatentConfig
from diffusion.random import Purpose, seed_global
from experiments.support.following import next_of_stage_two
from experiments.support.options import define
from infty_diff.encodings import load_or_encode
from runtime.command import Command, readable_errors
from runtime.processes import Processes
from training.latent_stage import LatentStage
from training.prepare import LatentRun, prepare_latent_run
from training.trainer import Trainer

FLAGS = flags.FLAGS
define("decoder_run_weights")


def main(run: LatentRun, command: Command) -> None:
    which = FLAGS.decoder_run_weights
    with readable_errors():
        weights = run.decoder.files["image"]
        latents = load_or_encode(run.decoder, run.decoder.config.data, weights, run.processes, run.images)
        seed_global(run.config.run.seed, Purpose.WEIGHTS)
        stage = LatentStage(run.config, latents, run.decoder, run.precision, run.processes)
        Trainer(run.config, stage, run.run_dir, run.precision, run.processes).run(next_of_stage_two(command, which))


def prepare(configs: dict[str, ImageConfig | LatentConfig], processes: Processes) -> LatentRun:
    return prepare_latent_run(configs, processes, FLAGS.decoder_run_weights)


if __name__ == "__main__":
    stages = {"config": LatentConfig, "decoder_config": ImageConfig}
    Command(__doc__, stages, as_given=("config",)).run_in_all(main, prepare)
