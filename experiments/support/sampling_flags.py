"""The flags that say how images are drawn."""

from absl import flags

from diffusion.samplers import SAMPLERS
from infty_diff.model import SamplingOptions

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Flags of every command that draws images."""
    steps = ", ".join(f"{sampler.steps} for {name}" for name, sampler in SAMPLERS.items())
    flags.DEFINE_string("sampling_steps", None, f"step subset: 100, ddim50, 10,15,20 or logsnr20; default: {steps}")
    flags.DEFINE_enum("sampler", SamplingOptions.sampler, list(SAMPLERS), "sampler of the images")
    flags.DEFINE_float("eta", SamplingOptions.eta, "noise of DDIM, 0 to 1")
    flags.DEFINE_float(
        "inv_snr",
        SamplingOptions.inv_snr,
        "inverse signal-to-noise ratio of the Wiener filter that undoes the mollifier",
    )


def sampling_options() -> SamplingOptions:
    """The options of the flags."""
    return SamplingOptions(FLAGS.sampling_steps, FLAGS.sampler, FLAGS.eta, FLAGS.inv_snr)
