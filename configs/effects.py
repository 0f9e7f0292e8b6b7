"""Fields that a command line sets in vain: they are refused, lest the user believes that they did something."""

from collections.abc import Iterable

from configs.schema import ImageConfig, LatentConfig
from data.datasets import DATASETS

# Field -> the field that decides whether it counts, and the values with which it does.
_NEEDS = {
    "data.root_dir": ("data.name", tuple(name for name in DATASETS if name != "functions")),
    "data.fields": ("data.name", ("fields",)),
    "data.anomalies": ("data.name", ("fields",)),
    "data.unknown": ("data.name", ("fields",)),
    "data.origin": ("data.name", ("fields",)),
    "data.memory_gb": ("data.in_memory", ("auto",)),
    "train.amp_dtype": ("train.amp", (True,)),
    "model.kld_weight": ("model.stochastic_encoding", (True,)),
    "diffusion.min_snr_gamma": ("diffusion.loss_weight", ("min_snr",)),
    "optimizer.gradient_skip_threshold": ("optimizer.gradient_skip", (True,)),
    "optimizer.schedule_ref_steps": ("optimizer.schedule", ("inverse_sqrt",)),
}
_COMPUTING = ("train.amp", "train.amp_dtype")  # fields of the training that sampling computes by, too


def training_only(path: str) -> bool:
    """Whether a field, "section.field", counts in training alone."""
    return path.partition(".")[0] in ("train", "optimizer") and path not in _COMPUTING


def in_vain(config: ImageConfig | LatentConfig, overridden: Iterable[str], trains: bool, name: str) -> list[str]:
    """One line for each overridden field without effect.

    Args:
        config: in force.
        overridden: the fields that the command line sets, "section.field".
        trains: whether the command trains what `config` describes.
        name: prefix of the fields in messages, as on the command line.
    """
    faults = []
    for path in dict.fromkeys(overridden):
        said, accepted = f"{name}.{path} is {_value(config, path)!r}", ""
        other, values = _NEEDS.get(path, ("", ()))
        if training_only(path) and not trains:
            accepted = "in the command that trains it, this one does not"
        elif other and _value(config, other) not in values:
            accepted = f"with {other}={' or '.join(map(str, values))}, here it is {_value(config, other)!r}"
        elif path == "mc_integral.ratio" and isinstance(config, ImageConfig):
            points, wanted = (
                config.mc_integral.q_sample,
                int(config.mc_integral.ratio * config.size[0] * config.size[1]),
            )
            if points != wanted:
                accepted = f"one of ratio and q_sample, and q_sample={points} decides"
        if accepted:
            faults.append(f"{said}; accepted: {accepted}")
    return faults


def _value(config: ImageConfig | LatentConfig, path: str) -> object:
    section, name = path.split(".")
    return getattr(getattr(config, section), name)
