"""Turn checkpoints of the authors' code into runs, ready for generate_samples.py and the other commands.

    python experiments/import_reference_checkpoint.py \\
        --config configs/ffhq_256_config.py --config.run.experiment="ffhq_theirs" \\
        --checkpoint=THEIRS/checkpoints/ffhq_mollified_256 \\
        --latent_config configs/ffhq_latent_config.py --latent_config.run.experiment="ffhq_theirs_sampler" \\
        --latent_checkpoint=THEIRS/checkpoints/ffhq_mollified_256_sampler

Either stage may be left out. A checkpoint is a file, or the folder in which their code keeps it: checkpoint.pkl,
latent_checkpoint.pkl with latents.pkl beside it. The configuration must be that of the model; what a checkpoint can
contradict is compared. The runs compute what the authors' code does: model.coordinate_convention=reference, and
model.encoder_block_norm=false where torchsparse stored the weights. A run that exists is never touched, no code that
a checkpoint holds is executed, and nothing is written unless all of it could be read.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags

from configs.schema import ImageConfig, LatentConfig
from infty_diff.reference_runs import (
    CHOICES,
    ReferenceRun,
    read_image_run,
    read_latent_run,
    refuse_existing,
    write_runs,
)
from runtime.command import Command, readable_errors

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "the authors' autoencoder, with --config: checkpoint.pkl, or its folder")
flags.DEFINE_string("latent_checkpoint", None, "their latent model, with --latent_config: latent_checkpoint.pkl, "
                    "best_latent_checkpoint.pkl, or the folder of the first")  # fmt: skip
flags.DEFINE_string("latents", None, "their latents.pkl, for its mean and deviation; default: beside the latent model")
flags.DEFINE_enum("weights_from", "auto", CHOICES, "those of denoiser and latent model: average, last step, or by auto "
                  "the average, unless a denoiser's still holds much of its random start")  # fmt: skip
_STAGES = {"config": "checkpoint", "latent_config": "latent_checkpoint"}
_FROM_CHECKPOINT = ("model.coordinate_convention", "model.encoder_block_norm")


def main(configs: dict[str, Any], overridden: dict[str, list[str]]) -> None:
    with readable_errors():
        check_flags(configs)
        refuse_existing(list(configs.values()))  # before gigabytes are read
        runs: list[ReferenceRun] = []
        if "config" in configs:
            runs.append(read_image_run(Path(FLAGS.checkpoint), configs["config"], FLAGS.weights_from))
            check_overrides(configs["config"], overridden["config"], runs[0].config)
        if "latent_config" in configs:
            latents = Path(FLAGS.latents) if FLAGS.latents else None
            config: LatentConfig = configs["latent_config"]
            runs.append(read_latent_run(Path(FLAGS.latent_checkpoint), latents, config, FLAGS.weights_from))
        if len(runs) == 2 and len(runs[1].tensors["mean"]) != runs[0].config.model.z_dim:
            raise ValueError(
                f"--latent_checkpoint is {FLAGS.latent_checkpoint}: draws latents of size "
                f"{len(runs[1].tensors['mean'])}; accepted: {runs[0].config.model.z_dim}, as --checkpoint decodes"
            )
        write_runs(runs)
    for run in runs:
        print("\n  ".join([f"{run.path}: step {run.step} of {' and '.join(run.files)}", *run.notes]))


def check_flags(configs: dict[str, Any]) -> None:
    """A stage needs both its configuration and its checkpoint."""
    if not configs and not any(FLAGS[flag].value for flag in _STAGES.values()):
        raise ValueError("--checkpoint, --latent_checkpoint; accepted: one of them, or both")
    for name, flag in _STAGES.items():
        if (name in configs) != bool(FLAGS[flag].value):
            raise ValueError(f"--{name}, --{flag}; accepted: both, or neither")
    if FLAGS.latents and "latent_config" not in configs:
        raise ValueError(f"--latents is {FLAGS.latents}; accepted: with --latent_checkpoint only")


def check_overrides(given: ImageConfig, overridden: list[str], imported: ImageConfig) -> None:
    """What the checkpoint decides cannot be said otherwise."""
    for path in set(_FROM_CHECKPOINT) & set(overridden):
        name = path.split(".")[1]
        value, needed = getattr(given.model, name), getattr(imported.model, name)
        if value != needed:
            raise ValueError(f"--config.{path} is {value}; accepted: {needed}, for this checkpoint")


if __name__ == "__main__":
    stages = {"config": ImageConfig, "latent_config": LatentConfig}
    command = Command(__doc__, stages, optional=tuple(stages), as_given=tuple(stages))
    command.run(main)
