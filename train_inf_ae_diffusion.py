"""Stage one: train the diffusion autoencoder of functions (encoder and denoiser) on images.

    python train_inf_ae_diffusion.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --config.data.root_dir=PATH

The run is kept in <run.root_dir>/<run.experiment>: config.json, metrics.jsonl, images/, checkpoints/ and
weights.safetensors (EMA weights for sampling). The same command continues an interrupted run.

On several GPUs: torchrun --standalone --nproc_per_node=8 train_inf_ae_diffusion.py …, which share the train.batch_size
images of each step. A run may be continued with another number of GPUs.
"""

from configs.schema import ImageConfig
from diffusion.random import Purpose, seed_global
from experiments.support.following import next_of_stage_one
from runtime.command import Command, readable_errors
from training.image_stage import ImageStage
from training.prepare import ImageRun, prepare_image_run
from training.trainer import Trainer


def main(run: ImageRun, command: Command) -> None:
    with readable_errors():
        seed_global(run.config.run.seed, Purpose.WEIGHTS)
        stage = ImageStage(run.config, run.train_set, run.val_set, run.precision, run.processes)
        Trainer(run.config, stage, run.run_dir, run.precision, run.processes).run(next_of_stage_one(command))


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, as_given=("config",)).run_in_all(main, prepare_image_run)
