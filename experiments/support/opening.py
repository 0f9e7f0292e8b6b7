"""The trained model that a command line names."""

from absl import flags

from configs.schema import ImageConfig, LatentConfig
from infty_diff.model import InftyDiff
from runtime.saved import saved_files
from runtime.stored import run_path

FLAGS = flags.FLAGS


def opened(image: ImageConfig, latent: LatentConfig | None = None) -> InftyDiff:
    """The model of --saved_model, else that of the runs.

    Args:
        image, latent: the configurations of the command line; without the second the model has no prior.
    """
    if FLAGS.saved_model:
        files = saved_files(FLAGS.saved_model)
        where = files.image, files.latent if latent else None
    else:
        where = run_path(image), run_path(latent) if latent else None
    which = (FLAGS.decoder_run_weights, FLAGS.run_weights) if latent else (FLAGS.run_weights,)
    return InftyDiff.from_runs(*where, (latent or image).run.device, image, latent, *which)
