"""Configurations read back from the files of a run, and what may change when a run is used again."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from configs.schema import ImageConfig, LatentConfig, sections
from configs.validate import Config, ConfigError, freeze
from data.opening import read_json
from runtime.files import present

SHAPING = frozenset(
    f"{name}.{field.name}"
    for stage in (ImageConfig, LatentConfig)
    for name, section in sections(stage).items()
    for field in dataclasses.fields(section)
    if field.metadata["shapes"]
)

RETIRED = frozenset({"data.fid_samples", "train.recompute"})  # fields that had no effect in one of the stages

GUARD = "guard"  # in the header of weights: their format and checksum
CONFIG, WEIGHTS = "config.json", "weights.safetensors"  # of a run
BEST_WEIGHTS = "best_weights.safetensors"  # those with the least held-out loss
WHICH_WEIGHTS = {"newest": WEIGHTS, "best": BEST_WEIGHTS}  # which weights of a run are loaded


def run_path(config: ImageConfig | LatentConfig) -> Path:
    """The folder of a run: `<run.root_dir>/<run.experiment>`."""
    return Path(config.run.root_dir) / config.run.experiment


def weights_path(run: Path, which: str = "newest") -> Path:
    """The file of a run's weights: those saved last, the "best" on held-out data, or by number those of a step.

    Raises:
        ValueError: for another word, where the best were never kept, a step that train.keep_every did not keep, or a
            file that holds another.
    """
    if which.isdecimal():
        path = numbered_weights(run, int(which))
        if not present(path):
            kept = sorted(int(file.stem.removeprefix("step_")) for file in path.parent.glob("step_*.safetensors"))
            raise ValueError(
                f"{path}: no such file; accepted: the steps kept, {', '.join(map(str, kept)) or 'none here'}"
            )
        if (step := read_header(path).get("step")) != int(which):
            raise ValueError(f"{path}: holds weights of step {step}; accepted: those of the step in its name")
        return path
    if which not in WHICH_WEIGHTS:
        raise ValueError(f"weights is {which!r}; accepted: {', '.join(WHICH_WEIGHTS)}, or a step that was kept")
    path = run / WHICH_WEIGHTS[which]
    if which == "best" and not present(path):
        raise ValueError(f"{path}: no such file; accepted: the newest weights, or a run that logged a held-out loss")
    return path


def numbered_weights(run: Path, step: int) -> Path:
    """The file of the weights that train.keep_every keeps of a step."""
    return run / "weights" / f"step_{step:08d}.safetensors"


def read_header(path: Path) -> dict[str, Any]:
    """The header (config, step, versions) of a safetensors file of this project.

    Raises:
        ValueError: when the file is missing, damaged, or not of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("header")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; accepted: weights written by training") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if header is None:
        raise ValueError(f"{path}: has no configuration inside; accepted: weights written by training")
    try:
        content = json.loads(header)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its header is no object of JSON; accepted: weights written by training")
    content.pop(GUARD, None)
    return content


def stored_config(run: Path, cls: type[Config]) -> Config | None:
    """The configuration of a run: that of its weights, before there are any that of its folder; None without a run.

    Raises:
        ValueError: when it cannot be read, or is not one of this stage.
    """
    if present(run / WEIGHTS):
        plain = require_config(read_header(run / WEIGHTS).get("config"), str(run / WEIGHTS))
    elif present(run / CONFIG):
        plain = read_config(run / CONFIG)
    else:
        return None
    stage = stage_of(plain)
    if stage is not None and stage is not cls:
        raise ValueError(f"{run}: is a run of {stage.__name__}; accepted: a run of {cls.__name__}")
    return config_from(plain, cls, str(run))


def read_config(path: Path) -> dict[str, Any]:
    """The plain configuration in a file of JSON; ValueError naming the file when it holds none."""
    return require_config(read_json(path, dict, "the configuration of a run"), str(path))


def require_config(plain: Any, where: str) -> dict[str, Any]:
    """Return `plain` if it has the form of a configuration, sections of fields; else ValueError naming `where`."""
    if not isinstance(plain, dict) or not all(isinstance(section, dict) for section in plain.values()):
        raise ValueError(f"{where}: holds no configuration; accepted: that of a run of this project")
    return plain


def stage_of(names: Iterable[str]) -> type[ImageConfig] | type[LatentConfig] | None:
    """The stage whose configurations have exactly these sections, if there is one."""
    return next((cls for cls in (ImageConfig, LatentConfig) if sections(cls).keys() == set(names)), None)


def config_from(plain: dict[str, Any], cls: type[Config], where: str) -> Config:
    """Freeze the configuration stored in `where`: fields that it lacks take their defaults, `RETIRED` ones are dropped.

    Raises:
        ValueError: when this version does not accept it.
    """
    values = {}
    for name, section in sections(cls).items():
        defaults = {f.name: f.default for f in dataclasses.fields(section)}
        stored = plain.get(name, {}).items()
        values[name] = {**defaults, **{k: v for k, v in stored if k in defaults or f"{name}.{k}" not in RETIRED}}
    try:
        return freeze(ConfigDict(values), cls)
    except ConfigError as error:
        raise ValueError(f"{where}: holds a configuration this version refuses: {'; '.join(error.faults)}") from None


def changes(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between two plain configurations: "section.field" -> (stored, given)."""
    old, new = flatten(stored), flatten(given)
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Name the fields that shape the result and differ, with both values, of two plain configurations."""
    found = changes(stored, given).items()
    return [f"{key} is {old!r} there, {new!r} here" for key, (old, new) in found if key in SHAPING]


def shaping(plain: dict[str, Any]) -> dict[str, Any]:
    """Of a plain configuration the fields that shape the result."""
    sections = {name: {k: v for k, v in part.items() if f"{name}.{k}" in SHAPING} for name, part in plain.items()}
    return {name: part for name, part in sections.items() if part}


def relocate(stored: Config, given: Config, overridden: list[str], where: str) -> Config:
    """The stored configuration of a run with what the command line changes of it, nothing that shapes it.

    Args:
        stored: as the run was trained.
        given: from the configuration file and the command line. Where the run lies and computes is as given.
        overridden: the fields set on the command line, "section.field"; others keep their stored value.
        where: the run, for the message.
    Raises:
        ConfigError: when the command line contradicts how the run was trained, with a line for each field, or the two
            do not fit together.
    """
    faults = []
    run = dataclasses.replace(given.run, seed=stored.run.seed)
    for path in dict.fromkeys(overridden):
        section, name = path.split(".", 1)
        value, trained = getattr(getattr(given, section), name), getattr(getattr(stored, section), name)
        if path not in SHAPING:
            part = dataclasses.replace(getattr(stored, section), **{name: value})
            stored = dataclasses.replace(stored, **{section: part})
        elif value != trained:
            faults.append(
                f"{path} is {value!r}, but {where} was trained with {trained!r}; accepted: that value, or none"
            )
    if faults:
        raise ConfigError(faults)
    return freeze(ConfigDict(dataclasses.asdict(dataclasses.replace(stored, run=run))), type(stored))


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
