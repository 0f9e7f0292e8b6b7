"""The flags that several commands have: each is defined here, once, and means the same everywhere."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from absl import flags

from configs.schema import MOST_SAMPLES, MOST_SEED
from diffusion.process import DiffusionProcess, Prediction
from diffusion.samplers import SAMPLERS
from diffusion.schedules import STEPS_ACCEPTED
from experiments.support.parsing import parse_size
from infty_diff.filter_file import CALIBRATED
from infty_diff.folder import FolderOptions
from infty_diff.sampling import SamplingOptions, stored_sampling
from metrics.extractors import EXTRACTORS
from metrics.features import Extraction
from metrics.resize import by
from runtime.saved import saved_files

FLAGS = flags.FLAGS
_NEWEST = ("newest", "newest")  # weights of both runs


def between(low: float, high: float) -> dict[str, float]:
    """The bounds of a numeric flag; `Command` refuses nan besides."""
    return {"lower_bound": low, "upper_bound": high}


_STEPS = ", ".join(f"{sampler.steps} for {name}" for name, sampler in SAMPLERS.items())

# What defines a flag, its default, its help, what it accepts.
_Flag = tuple[Callable[..., Any], Any, str, dict[str, Any]]


def _which_weights(name: str) -> _Flag:
    text = (
        f"weights of the run of --{name}: newest, best = those with the least loss on held-out data, or the number of "
        "a step that train.keep_every kept"
    )
    return flags.DEFINE_string, "newest", text, {}


_FLAGS: dict[str, _Flag] = {
    "cache_dir": (flags.DEFINE_string, str(Extraction.cache_dir), "folder that keeps features of real images", {}),
    "decoder_run_weights": _which_weights("decoder_config"),
    "device": (flags.DEFINE_string, "auto", "device to run on: auto, cpu, cuda or cuda:1", {}),
    "encoder_run_weights": _which_weights("encoder_run"),
    "eta": (flags.DEFINE_float, SamplingOptions.eta, "noise of DDIM", between(0.0, 1.0)),
    "inv_snr": (flags.DEFINE_string, str(SamplingOptions.inv_snr),
                "inverse signal-to-noise ratio of the Wiener filter that undoes the mollifier; calibrated = by "
                "frequency, as experiments/calibrate_filter.py stored it with the weights", {}),
    "latent_sampling_steps": (flags.DEFINE_string, None, "step subset of the latent model; default: all steps", {}),
    "model": (flags.DEFINE_enum, "clip_vit_b_32", "feature extractor of the metrics",
              {"enum_values": (*EXTRACTORS, "encoder")}),
    "num_samples": (flags.DEFINE_integer, None, "number of samples", between(1, MOST_SAMPLES)),
    "out_dir": (flags.DEFINE_string, None, "folder of the results", {}),
    "run_weights": _which_weights("config"),
    "sample_batch_size": (flags.DEFINE_integer, 16, "images drawn together on a GPU", between(1, 65_536)),
    "sample_img_size": (flags.DEFINE_string, None, "size of the results, a side or height x width as in 192x320", {}),
    "sampler": (flags.DEFINE_enum, SamplingOptions.sampler, "sampler of the images", {"enum_values": SAMPLERS}),
    "sampling_steps": (flags.DEFINE_string, SamplingOptions.steps,
                       f"step subset of the images: {STEPS_ACCEPTED}; default: {_STEPS}", {}),
    "saved_model": (flags.DEFINE_string, None,
                    "instead of configuration files and runs: a folder that InftyDiff.save wrote, or the name of a "
                    "model in weights/, such as landscapes-32. How it samples is stored with it, and the default", {}),
    "seed": (flags.DEFINE_integer, 0, "seed of the noise of the first image; later ones follow",
             between(0, MOST_SEED)),
    "seeds": (flags.DEFINE_string, None, "seeds of the noise, one result each: 0-99 or 3,7,10-12", {}),
    "weights": (flags.DEFINE_string, None, "file of pretrained weights; default: the usual cache, else a download", {}),
}  # fmt: skip


_SAMPLING = {"steps": "sampling_steps", "sampler": "sampler", "eta": "eta", "inv_snr": "inv_snr"}


def define(*names: str, **notes: str) -> None:
    """Define some of these flags.

    Args:
        names: of the flags; "seeds=0-3" gives one another default.
        notes: by the name of a flag, what its help says of this command.
    """
    for name, _, value in (name.partition("=") for name in names):
        definer, default, text, accepted = _FLAGS[name]
        what, _, usual = text.partition("; default: ")
        what += notes.get(name, "") + (f"; default: {usual}" if usual and not value else "")
        definer(name=name, default=value or default, help=what, **accepted)


def sampling_options() -> SamplingOptions:
    """--sampling_steps, --sampler, --eta and --inv_snr; what is not given is as stored with --saved_model, if any."""
    saved = FLAGS.saved_model
    stored = stored_sampling(saved_files(saved).image) if saved else SamplingOptions()
    given = {name: FLAGS[flag].value for name, flag in _SAMPLING.items()
             if flag in FLAGS and (FLAGS[flag].present or not saved)}  # fmt: skip
    if given.get("sampler", stored.sampler) != stored.sampler:  # steps and eta belong to a sampler
        given = {"steps": None, "eta": SamplingOptions.eta, **given}
    return replace(stored, **given)


def require_run_of_weights(flag: str, run: object) -> None:
    """Refuse a choice of weights of a run that is not given."""
    if FLAGS[flag].value != "newest" and not run:
        raise ValueError(f"--{flag} is {FLAGS[flag].value}; accepted: newest, or with the run that it is of")


def requested_size() -> tuple[int, int] | None:
    """--sample_img_size as (H, W), or None."""
    return parse_size(FLAGS.sample_img_size) if FLAGS.sample_img_size else None


def settings_name(size: tuple[int, int], steps: str, sampler: str = "ddim") -> str:
    """Name a folder of samples after its settings, e.g. 192x320_ddim100."""
    return f"{by(size)}_{sampler}{steps.replace(',', '-').removeprefix(sampler)}"


def folder_name(options: FolderOptions, process: DiffusionProcess, weights: tuple[str, str] = _NEWEST) -> str:
    """Name a folder of samples after its settings, e.g. 192x320_ddim100; weights: which of both runs."""
    sampling = options.sampling
    name = settings_name(options.size, sampling.steps, sampling.sampler)
    name += f"_eta{sampling.eta:g}" if sampling.eta else ""
    name += "_calibrated" if sampling.inv_snr == CALIBRATED else ""
    name += f"_snr{sampling.inv_snr:g}" if sampling.inv_snr not in (CALIBRATED, SamplingOptions.inv_snr) else ""
    name += "_filter" if process.prediction is Prediction.X0 and not process.keep_sharp else ""
    name += "".join(f"_{which}" for which in weights) if weights != _NEWEST else ""
    return name + (f"_latent{options.latent_steps.replace(',', '-')}" if options.latent_steps else "")
