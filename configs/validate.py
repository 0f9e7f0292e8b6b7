"""Check a `ConfigDict` against the schema, all faults at once, and freeze it into typed values."""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, cast, overload

from ml_collections import ConfigDict

from configs.schema import ImageConfig, LatentConfig, sections
from data.base import CHANNELS
from diffusion.schedules import make_betas
from models.factory import grid_spec, sparse_spec
from models.sparse_unet import check_time_dim

_LONGEST = 16  # entries of a tuple
_LONGEST_NAME = 200  # bytes of the name of a run: files are called after it
_SHOWN = 200  # characters of a value in a message
_HUGE = 10**300  # integers beyond are no float
Config = TypeVar("Config", bound=ImageConfig | LatentConfig)


class ConfigError(ValueError):
    """One or more configuration faults; `faults` holds one readable line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@overload
def freeze(config: ConfigDict, *, name: str = "config") -> ImageConfig: ...


@overload
def freeze(config: ConfigDict, cls: type[Config], name: str = "config") -> Config: ...


def freeze(config: ConfigDict, cls: Any = ImageConfig, name: str = "config") -> Any:
    """Return `config` as the frozen dataclass `cls`.

    Args:
        config: the sections and fields of `configs/schema.py`.
        cls: `ImageConfig` or `LatentConfig`.
        name: prefix of the fields in messages, as on the command line.
    Raises:
        ConfigError: with one line per fault, naming the field, its value and what is accepted.
    """
    known = sections(cls)
    faults = _unknown(config, list(known), name)
    checked: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    missing: list[str] = []
    for key, section in known.items():
        given = config[key] if key in config else None
        if not isinstance(given, ConfigDict):
            missing.append(f"{name}.{key}")
            continue
        faults += _unknown(given, [f.name for f in fields(section)], f"{name}.{key}")
        values, section_faults = _section(given, section, key)
        wrong |= section_faults
        if not section_faults:
            checked[key] = section(**values)
    if missing:
        are = "is" if len(missing) == 1 else "are"
        faults.append(f"{', '.join(missing)} {are} missing; accepted: a section with the fields of the schema")
    faults += [f"{name}.{path}{fault}" for path, fault in _first_causes(wrong, known).items()]
    if not faults:
        frozen = cls(**checked)
        faults = (_image_faults if isinstance(frozen, ImageConfig) else _run_faults)(frozen, name)
    if faults:
        raise ConfigError(faults)
    return frozen


def nearest(word: str, known: list[str]) -> str:
    """Return `; did you mean ...?` for a misspelt name, or nothing when no known name is near."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else f"; accepted: {', '.join(sorted(known))}"


def _unknown(given: ConfigDict, known: list[str], where: str) -> list[str]:
    return [f"{where}.{key} is no field{nearest(str(key), known)}" for key in given if key not in known]


def _section(given: ConfigDict, cls: Any, section: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The values of a section by field, and by "section.field" what is wrong with them."""
    checked, faults = {}, {}
    for spec in fields(cls):
        key, rule = spec.name, cast(Any, spec)
        if key not in given:
            faults[f"{section}.{key}"] = f" is missing; accepted: {rule.type.__name__}"
            continue
        try:
            value = given[key]
        except Exception:  # a derived field of a number that it cannot be computed from, such as inf
            value = None
        checked[key], fault = _value(value, rule)
        if fault:
            faults[f"{section}.{key}"] = f" is {shown(value)}; {fault}"
    return checked, faults


def shown(value: Any) -> str:
    """A value for a message, cut short; integers of thousands of digits have no decimal form in Python."""
    try:
        text = one_line(repr(value))
    except ValueError:
        text = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _first_causes(wrong: dict[str, str], known: dict[str, Any]) -> dict[str, str]:
    """The faults without those of fields that derive from a field with a fault."""
    derived = {f"{key}.{f.name}": f.metadata["derived"] for key, section in known.items() for f in fields(section)}
    return {
        path: fault
        for path, fault in wrong.items()
        if not any(other in wrong for other in re.findall(r"\w+\.\w+", derived[path] or ""))
    }


_ITEMS = {int: "integers", float: "numbers with a decimal point"}


def _value(value: Any, spec: Any) -> tuple[Any, str | None]:
    """Return the value as the type of its field, and what is wrong with it or None."""
    rule = spec.metadata
    if spec.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < _HUGE else math.copysign(math.inf, value)
    if spec.type is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not spec.type:
        return value, f"accepted: {spec.type.__name__}"
    low, high = rule["low"], rule["high"]
    if spec.type is tuple:
        right = len(value) <= _LONGEST and all(type(v) is rule["items"] and low <= v <= high for v in value)
        accepted = f"a tuple of at most {_LONGEST} {_ITEMS[rule['items']]} from {low} to {high}"
        return value, None if right else f"accepted: {accepted}"
    if rule["choices"] and value not in rule["choices"]:
        hint = nearest(value, list(rule["choices"])) if isinstance(value, str) else ""
        listed = ", ".join(map(str, rule["choices"]))
        return value, f"accepted: {listed}" + (hint if hint.startswith("; did") else "")
    if spec.type is float and not math.isfinite(value):
        return value, "accepted: a finite number"
    if low is not None and not low <= value <= high:
        return value, f"accepted: {spec.type.__name__} {low} to {high}"
    return value, None


def _check(faults: list[str], ok: bool, field: str, value: Any, accepted: str) -> None:
    if not ok:
        faults.append(f"{field} is {shown(value)}; accepted: {accepted}")


def one_line(error: object) -> str:
    """The message of an error, which may come from a library, on one line."""
    return " ".join(str(error).split())


def _built(faults: list[str], name: str, build: Callable[[], object]) -> None:
    """Note what a constructor of the project says of the fields it is given."""
    try:
        build()
    except ValueError as error:
        faults.append(f"{name}.{one_line(error)}")


def _run_faults(config: ImageConfig | LatentConfig, name: str, resolution: int | None = None) -> list[str]:
    faults: list[str] = []
    experiment, rate, gamma = config.run.experiment, config.optimizer.learning_rate, config.diffusion.min_snr_gamma
    plain = experiment not in (".", "..") and experiment.isprintable() and not set(experiment) & set("/\\")
    plain = plain and 0 < len(experiment.encode()) <= _LONGEST_NAME
    accepted = f"a folder name without slashes, of at most {_LONGEST_NAME} bytes"
    _check(faults, plain, f"{name}.run.experiment", experiment, accepted)
    _check(faults, rate > 0, f"{name}.optimizer.learning_rate", rate, "a number > 0")
    _check(faults, gamma > 0, f"{name}.diffusion.min_snr_gamma", gamma, "a number > 0")
    diffusion = config.diffusion
    try:
        make_betas(diffusion.noise_schedule, diffusion.steps, resolution)
    except ValueError as error:
        faults.append(f"{name}.diffusion.noise_{one_line(error)}")
    lengths = config.train.ema_lengths
    _check(
        faults,
        len(set(lengths)) == len(lengths) != 1,
        f"{name}.train.ema_lengths",
        lengths,
        "none, or at least two different numbers, e.g. (0.05, 0.10)",
    )
    return faults


def _image_faults(config: ImageConfig, name: str) -> list[str]:
    faults = _run_faults(config, name, max(config.size))
    model, mc, diffusion = config.model, config.mc_integral, config.diffusion
    height, width = config.size
    channels = config.data.channels
    right = config.data.name == "fields" or channels in CHANNELS
    _check(faults, right, f"{name}.data.channels", channels, f"{', '.join(map(str, CHANNELS))} for images")
    _built(faults, name, lambda: sparse_spec(model))
    _built(faults, name, lambda: grid_spec(model))
    _built(faults, name, lambda: check_time_dim(model.time_emb_dim))
    sides = [model.uno_res >> level for level in range(len(model.uno_mults))]
    attended = model.uno_attn_resolutions
    levels = f"sides of the levels: {', '.join(map(str, sides))}"
    _check(faults, set(attended) <= set(sides), f"{name}.model.uno_attn_resolutions", attended, levels)
    _check(
        faults,
        model.knn_neighbours <= mc.q_sample <= height * width,
        f"{name}.mc_integral.q_sample",
        mc.q_sample,
        f"{model.knn_neighbours} (model.knn_neighbours) to {height * width} (data.img_size x data.img_width)",
    )
    _check(
        faults,
        diffusion.final_estimate != "network" or diffusion.model_mean_type == "xstart",
        f"{name}.diffusion.final_estimate",
        diffusion.final_estimate,
        f"auto or filter with diffusion.model_mean_type={diffusion.model_mean_type}; only xstart predicts the image",
    )
    return faults
