"""Configurations read back from the files of a run, and what may change when a run is used again."""

import dataclasses
from typing import Any, TypeVar

from ml_collections import ConfigDict

from configs.schema import ImageConfig, LatentConfig
from configs.validate import ConfigError, freeze

Config = TypeVar("Config", ImageConfig, LatentConfig)

SHAPING = frozenset(
    f"{section.name}.{field.name}"
    for stage in (ImageConfig, LatentConfig)
    for section in dataclasses.fields(stage)
    for field in dataclasses.fields(section.type)
    if field.metadata["shapes"]
)


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


def changes(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between two plain configurations: "section.field" -> (stored, given)."""
    old, new = flatten(stored), flatten(given)
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Name the fields that shape the result and differ, with both values, of two plain configurations."""
    found = changes(stored, given).items()
    return [f"{key} is {old!r} there, {new!r} here" for key, (old, new) in found if key in SHAPING]


def relocate(stored: Config, given: Config, overridden: list[str], where: str) -> Config:
    """The stored configuration of a finished run with what the command line changes of it, nothing that shapes it.

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
        if path not in SHAPING:
            part = dataclasses.replace(getattr(stored, section), **{name: value})
            stored = dataclasses.replace(stored, **{section: part})
        elif value != trained:
            raise ValueError(f"{path}={value!r}: {where} was trained with {trained!r}; accepted: that value, or none")
    return stored


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
