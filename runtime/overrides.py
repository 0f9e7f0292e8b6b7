"""Configuration files, and the `--config.section.field=value` of a command line that change them."""

import ast
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.validate import ConfigError, nearest, one_line, shown

_PATHS = (("run", "root_dir"), ("run", "wandb_dir"), ("data", "root_dir"), ("train", "init_from"))
_OVERRIDE = re.compile(r"--?(no)?(\w+)\.([\w.]+)(?:=(.*))?", re.DOTALL)


def load_config(path: str, name: str = "config") -> ConfigDict:
    """Run `get_config()` of a configuration file and lock the result.

    Raises:
        ConfigError: when the file does not exist, does not run, or has no `get_config`.
    """
    file = Path(expanded(path, name))
    try:
        found = file.is_file()
    except OSError as error:
        raise ConfigError([f"--{name}={path}: {error.strerror}; accepted: a Python file"]) from None
    if not found:
        known = sorted(str(p) for p in file.parent.glob("*_config.py")) if file.parent.is_dir() else []
        raise ConfigError([f"--{name}={path}: no such file{nearest(path, known) if known else ''}"])
    spec = importlib.util.spec_from_file_location(f"_{name}_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError([f"--{name}={path}: accepted: a Python file that defines get_config()"])
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except KeyboardInterrupt:  # the user's, not the file's
        raise
    except BaseException as error:  # a user's file can raise anything, SystemExit too; the line must name it
        raise ConfigError([f"--{name}={path}: {type(error).__name__}: {one_line(error)}"]) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError([f"--{name}={path}: get_config() returned {type(config).__name__}; accepted: ConfigDict"])
    return config.lock()


def apply_overrides(config: ConfigDict, overrides: list[tuple[str, str]], name: str = "config") -> list[str]:
    """Set `section.field` of `config` from text, in order, expand ~ in paths, and return one line per fault."""
    faults = []
    for path, text in overrides:
        section_name, _, key = path.partition(".")
        section = config.get(section_name) if section_name in config else None
        if not isinstance(section, ConfigDict):
            faults.append(f"--{name}.{path}: no such section{nearest(section_name, list(config))}")
        elif key not in section:
            faults.append(f"--{name}.{path}: no such field{nearest(key, list(section))}")
        else:
            kind = section.get_type(key)  # of a derived field, too, that cannot be computed from a number such as inf
            try:
                section[key] = _parse_text(text, kind)
            except ValueError:
                faults.append(f"--{name}.{path} is {shown(text)}; accepted: {kind.__name__}")
    for section_name, key in _PATHS:
        section = config.get(section_name)
        if isinstance(section, ConfigDict) and isinstance(section.get(key), str):
            try:
                section[key] = expanded(section[key], f"{name}.{section_name}.{key}")
            except ConfigError as error:
                faults += error.faults
    return faults


def expanded(path: str, name: str) -> str:
    """A path with ~ expanded, which shells do not do after an equals sign.

    Raises:
        ConfigError: for ~USER without such a user.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:
        raise ConfigError([f"--{name} is {path!r}; accepted: a path; {path.split('/')[0]} is nobody's home"]) from None


def _parse_text(text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise ValueError(text)
    if kind is tuple:
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ValueError(text) from error
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return kind(text)


def split_arguments(
    argv: list[str], names: Iterable[str], rest: list[str], faults: list[str]
) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Sort arguments into configuration files by name, and overrides (name, "section.field", text).

    Args:
        argv: arguments.
        names: of the configurations.
        rest: what is neither is appended here.
        faults: as are the overrides of other configurations here, one line each.
    """
    names = list(names)
    files: dict[str, str] = {}
    overrides: list[tuple[str, str, str]] = []
    queue = list(argv)
    while queue:
        arg = queue.pop(0)
        name, eq, value = arg.lstrip("-").partition("=")
        match = _OVERRIDE.fullmatch(arg)
        follows = bool(queue) and not queue[0].startswith("--")
        if arg.startswith("-") and name in names:
            if not eq and not follows:
                continue
            files[name] = value if eq else queue.pop(0)
        elif match and match[2] in names:
            negated, owner, path, text = match.groups()
            if text is None:
                text = "false" if negated else (queue.pop(0) if follows else "true")
            overrides.append((owner, path, text))
        elif match and arg.startswith("--"):
            faults.append(f"{arg}: no such configuration{nearest(match[2], names)}")
        else:
            rest.append(arg)
    return files, overrides
