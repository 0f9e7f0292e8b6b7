"""Configurations read back from the files of a run, and what may change when a run is used again."""

import dataclasses
from typing import Any, TypeVar

from ml_collections import ConfigDict

from configs.schema import ImageConfig, LatentConfig
from configs.validate import ConfigError, freeze

Config = TypeVar("Config", ImageConfig, LatentConfig)

# Fields (or their beginnings) that do not shape the result of a run: where things live, how long it goes, what it says.
FREE_FIELDS = (
    "run.name", "run.experiment", "run.root_dir", "run.device", "run.wandb",
    "data.root_dir", "data.in_memory", "data.memory_gb", "data.num_workers", "data.fid_samples",
    "train.steps", "train.plot_", "train.sample_size", "train.checkpoint_steps", "train.keep_checkpoints",
    "train.load_checkpoint", "train.calculate_test_loss_steps", "train.test_loss_repeats",
    "train.compile", "train.recompute", "model.backend", "model.attention",
    "model.tile_points",
)  # fmt: skip


def config_from(plain: dict[str, Any], cls: type[Config], where: str) -> Config:
    """Freeze the configuration stored in `where`; fields that it does not know yet take their defaults.

    Raises:
        ValueError: when this version does not accept it.
    """
    sections = {}
    for section in dataclasses.fields(cls):
        defaults = {f.name: f.default for f in dataclasses.fields(section.type)}
        sections[section.name] = {**defaults, **plain.get(section.name, {})}
    try:
        return freeze(ConfigDict(sections), cls)
    except ConfigError as error:
        raise ValueError(f"{where}: holds a configuration this version refuses: {'; '.join(error.faults)}") from None


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Name the fields that shape the result and differ, with both values, of two plain configurations."""
    old, new = flatten(stored), flatten(given)
    return [
        f"{key} is {old[key]!r} there, {new[key]!r} here"
        for key in old
        if key in new and old[key] != new[key] and not key.startswith(FREE_FIELDS)
    ]


def relocate(stored: Config, given: Config, overridden: list[str], where: str) -> Config:
    """The stored configuration of a finished run with what the command line says of places and reports.

    Args:
        stored: as the run was trained.
        given: from the configuration file and the command line.
        overridden: the fields set on the command line, "section.field"; others keep their stored value.
        where: the run, for the message.
    Raises:
        ValueError: when the command line contradicts how the run was trained.
    """
    for path in overridden:
        section, name = path.split(".", 1)
        value, trained = getattr(getattr(given, section), name), getattr(getattr(stored, section), name)
        if path.startswith(FREE_FIELDS):
            part = dataclasses.replace(getattr(stored, section), **{name: value})
            stored = dataclasses.replace(stored, **{section: part})
        elif value != trained and section in ("data", "model", "diffusion"):
            raise ValueError(f"{path}={value!r}: {where} was trained with {trained!r}; accepted: that value, or none")
    return stored


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
