"""Stage one: train the diffusion autoencoder of functions (encoder and denoiser) on images.

    python train_inf_ae_diffusion.py --config configs/ffhq_256_config.py \\
        --config.run.experiment="ffhq_mollified_256" --config.data.root_dir=PATH

The run is kept in <run.root_dir>/<run.experiment>: config.json, metrics.jsonl, images/, checkpoints/ and
weights.safetensors (averaged weights for sampling). The same command continues an interrupted run.

On several GPUs: torchrun --standalone --nproc_per_node=8 train_inf_ae_diffusion.py …, which share the train.batch_size
images of each step. A run may be continued with another number of GPUs.
"""

from typing import Any

from configs.schema import ImageConfig
from runtime.command import Command, readable_errors
from runtime.precision import Precision, pick_device
from runtime.processes import Processes
from runtime.run_dir import RunDir
from training.image_stage import ImageStage
from training.trainer import Trainer


def main(configs: dict[str, Any], _: dict[str, list[str]], processes: Processes) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        precision = Precision.create(pick_device(config.run.device), config.train.amp, config.train.amp_dtype)
        run_dir = RunDir(config, resume=config.train.load_checkpoint)
        stage = ImageStage.open(config, precision, processes)
        Trainer(config, stage, run_dir, precision, processes).run()


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, as_given=("config",)).run_in_all(main)
