"""The flags that say how images are drawn."""

from absl import flags

from diffusion.samplers import SAMPLERS
from diffusion.schedules import STEPS_ACCEPTED
from infty_diff.model import SamplingOptions

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of every command that draws images."""
    default, steps = SamplingOptions, ", ".join(f"{sampler.steps} for {name}" for name, sampler in SAMPLERS.items())
    text = f"step subset: {STEPS_ACCEPTED}; default: {steps}"
    flags.DEFINE_string("sampling_steps", default.steps, text)
    flags.DEFINE_enum("sampler", default.sampler, list(SAMPLERS), "sampler of the images")
    flags.DEFINE_float("eta", default.eta, "noise of DDIM, 0 to 1")
    text = "inverse signal-to-noise ratio of the Wiener filter that undoes the mollifier"
    flags.DEFINE_float("inv_snr", default.inv_snr, text)


def sampling_options() -> SamplingOptions:
    """The options of the flags."""
    return SamplingOptions(FLAGS.sampling_steps, FLAGS.sampler, FLAGS.eta, FLAGS.inv_snr)
