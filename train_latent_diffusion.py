"""Stage two: train the latent diffusion model on the encodings of a trained autoencoder.

    python train_latent_diffusion.py --config configs/ffhq_latent_config.py \\
        --config.run.experiment="ffhq_mollified_256_sampler" --decoder_config configs/ffhq_256_config.py \\
        --decoder_config.run.experiment="ffhq_mollified_256" --decoder_config.data.root_dir=PATH

The autoencoder is rebuilt as its run stored it; `--decoder_config` says where the run and its images are. Encodings are
computed once and kept beside the autoencoder. The same command continues an interrupted run.

On several GPUs: torchrun --standalone --nproc_per_node=8 train_latent_diffusion.py …, which share the encoding, and the
train.batch_size latents of each step. A run may be continued with another number of GPUs.
"""

from typing import Any

from configs.schema import ImageConfig, LatentConfig
from runtime.command import Command, chosen_weights, define_weights_flags, readable_errors
from runtime.precision import Precision, pick_device
from runtime.processes import Processes
from runtime.run_dir import RunDir
from training.latent_stage import LatentStage
from training.trainer import Trainer

define_weights_flags("decoder_config")


def main(configs: dict[str, Any], _: dict[str, list[str]], processes: Processes) -> None:
    config: LatentConfig = configs["config"]
    with readable_errors():
        precision = Precision.create(pick_device(config.run.device), config.train.amp, config.train.amp_dtype)
        run_dir = RunDir(config, resume=config.train.load_checkpoint)
        which = chosen_weights("decoder_config")
        stage = LatentStage.open(config, configs["decoder_config"], precision, processes, which)
        Trainer(config, stage, run_dir, precision, processes).run()


if __name__ == "__main__":
    Command(__doc__, {"config": LatentConfig, "decoder_config": ImageConfig}, as_given=("config",)).run_in_all(main)
