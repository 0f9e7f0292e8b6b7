"""Check a `ConfigDict` against the schema, all faults at once, and freeze it into typed values."""

import difflib
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar, overload

from ml_collections import ConfigDict

from configs.schema import ImageConfig, LatentConfig, sections
from diffusion.schedules import make_betas
from models.factory import grid_spec

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
    values = config.to_dict()
    known = sections(cls)
    faults = _unknown(values, list(known), name)
    checked = {}
    for key, section in known.items():
        given = values.get(key)
        if not isinstance(given, dict):
            faults.append(f"{name}.{key} is missing; accepted: a section with the fields of the schema")
            continue
        checked[key], section_faults = _section(given, section, f"{name}.{key}")
        faults += section_faults
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


def _unknown(given: dict, known: list[str], where: str) -> list[str]:
    return [f"{where}.{key} is no field{nearest(key, known)}" for key in given if key not in known]


def _section(given: dict, cls: Any, where: str) -> tuple[Any, list[str]]:
    known: dict[str, Any] = {f.name: f for f in fields(cls)}
    faults = _unknown(given, list(known), where)
    checked = {}
    for key, spec in known.items():
        if key not in given:
            faults.append(f"{where}.{key} is missing; accepted: {spec.type.__name__}")
            continue
        value, fault = _value(given[key], spec)
        if fault:
            faults.append(f"{where}.{key} is {given[key]!r}; {fault}")
        checked[key] = value
    return (None if faults else cls(**checked)), faults


_ITEMS = {int: "positive integers", float: "numbers above 0, with a decimal point"}


def _value(value: Any, spec: Any) -> tuple[Any, str | None]:
    """Return the value as the type of its field, and what is wrong with it or None."""
    rule = spec.metadata
    if spec.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if spec.type is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not spec.type:
        return value, f"accepted: {spec.type.__name__}"
    if spec.type is tuple and not all(type(v) is rule["items"] and v > 0 for v in value):
        return value, f"accepted: a tuple of {_ITEMS[rule['items']]}"
    if rule["choices"] and value not in rule["choices"]:
        hint = nearest(value, list(rule["choices"])) if isinstance(value, str) else ""
        listed = ", ".join(map(str, rule["choices"]))
        return value, f"accepted: {listed}" + (hint if hint.startswith("; did") else "")
    low, high = rule["low"], rule["high"]
    if spec.type is float and not math.isfinite(value):
        return value, "accepted: a finite number"
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f">= {low}" if high is None else f"{low} to {high}"
        return value, f"accepted: {spec.type.__name__} {bounds}"
    return value, None


def _check(faults: list[str], ok: bool, field: str, value: Any, accepted: str) -> None:
    if not ok:
        faults.append(f"{field} is {value!r}; accepted: {accepted}")


def one_line(error: Exception) -> str:
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
    plain = bool(experiment) and experiment not in (".", "..") and not set(experiment) & set("/\\\0")
    _check(faults, plain, f"{name}.run.experiment", experiment, "a folder name without slashes")
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
        not lengths or (len(set(lengths)) == len(lengths) > 1 and max(lengths) <= 0.28),
        f"{name}.train.ema_lengths",
        lengths,
        "none, or at least two different numbers up to 0.28, e.g. (0.05, 0.10)",
    )
    return faults


def _image_faults(config: ImageConfig, name: str) -> list[str]:
    faults = _run_faults(config, name, max(config.size))
    model, mc, diffusion = config.model, config.mc_integral, config.diffusion
    height, width = config.size
    _check(faults, model.kernel_size % 2 == 1, f"{name}.model.kernel_size", model.kernel_size, "an odd integer")
    _check(faults, model.time_emb_dim % 2 == 0, f"{name}.model.time_emb_dim", model.time_emb_dim, "an even integer")
    _built(faults, name, lambda: grid_spec(model))
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
