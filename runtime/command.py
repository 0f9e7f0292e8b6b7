"""Command lines: `--config=FILE --config.section.field=value`, other flags by absl, readable errors.

Overrides follow ml_collections; unlike its flag parser this one reports every fault of the command line
at once, one line each, and leaves with status 2.
"""

import ast
import contextlib
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from configs.schema import ImageConfig, LatentConfig
from configs.validate import ConfigError, freeze, nearest
from runtime.processes import Processes, leave
from runtime.stored import WHICH_WEIGHTS, relocate, run_path, stage_of, stored_config

_log = logging.getLogger(__name__)
_OVERRIDE = re.compile(r"--?(no)?(\w+)\.([\w.]+)(?:=(.*))?", re.DOTALL)


class Command:
    """A script's command line: which configuration files it takes and of which stage each is.

    Args:
        doc: the help text (the script's docstring).
        configs: flag name -> stage, for example {"config": LatentConfig, "decoder_config": ImageConfig}.
        optional: the names among them that may be left out, and are then absent from what `run` hands on.
        as_given: the names whose run the command makes or goes on with, or does not look for.

    What any other name stands for is a run, wherever that run exists: its stored configuration is handed on, with what
    the command line says of fields that do not shape what was trained; what contradicts it is refused. Where there
    is no run yet, file and command line count.
    """

    def __init__(
        self,
        doc: str,
        configs: dict[str, type[ImageConfig] | type[LatentConfig]],
        optional: tuple[str, ...] = (),
        as_given: tuple[str, ...] = (),
    ) -> None:
        self.doc, self.stages, self.optional, self.as_given = doc, configs, optional, as_given
        self.configs: dict[str, ImageConfig | LatentConfig] = {}
        self.overridden: dict[str, list[str]] = {name: [] for name in configs}
        self._runs: dict[str, Path] = {}
        self._given: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        for name, stage in configs.items():
            flags.DEFINE_string(name, None, f"{stage.__name__} file, e.g. {_EXAMPLES[stage]}")
        flags.DEFINE_bool("dry_run", False, "print the resolved configuration and stop")

    def run(self, main: Callable[[dict[str, Any], dict[str, list[str]]], None]) -> None:
        """Parse `sys.argv`, print the resolved configuration under --dry_run, else call `main(configs, overridden)`.

        `configs` holds the frozen configurations by flag name, `overridden` the fields set on the command line. Under
        torchrun the first process calls `main`, and the others wait.
        """
        self.run_in_all(lambda *given, processes: main(*given) if processes.is_first else None)

    def run_in_all(self, main: Callable[..., None]) -> None:
        """As `run`, but under torchrun all processes call `main(configs, overridden, processes=…)`."""
        with readable_errors():
            processes = Processes.from_environment()

        def body(_: list[str]) -> None:
            level = logging.INFO if processes.is_first else logging.WARNING
            logging.basicConfig(level=level, format="%(message)s", force=True)
            if flags.FLAGS.dry_run:
                if processes.is_first:
                    plain = {name: asdict(config) for name, config in self.configs.items()}
                    print(json.dumps(plain, indent=2, allow_nan=False))
                return
            for name, run in self._runs.items():
                _log.info("--%s: the configuration of the run %s", name, run)
            try:
                main(self.configs, self.overridden, processes=processes)
            except KeyboardInterrupt:  # met by every process, at any point: too late to agree on anything
                if processes.is_first:
                    print("error: interrupted; the same command goes on from here", file=sys.stderr)
                sys.exit(130)
            processes.agree()

        with processes.connected():
            app.run(body, flags_parser=lambda argv: self._parse(argv, processes))

    def arguments(self, name: str, as_name: str, changes: dict[str, Any]) -> list[str]:
        """A configuration as it was given, with changes, for the command line of a command that calls it `as_name`."""
        file, overrides = self._given[name]
        fields = [*overrides, *changes.items()]
        return [f"--{as_name}={file}", *(f"--{as_name}.{path}={value}" for path, value in fields)]

    def _parse(self, argv: list[str], processes: Processes) -> list[str]:
        if any(arg in ("--help", "-h", "-help") for arg in argv):
            if processes.is_first:
                print(self._help())
            sys.exit(0)
        faults, rest = [], argv[:1]
        config_files, overrides = _split(argv[1:], self.stages, rest, faults)
        try:
            positional = flags.FLAGS(rest)
        except flags.Error as error:
            leave([*faults, " ".join(str(error).split())])
        faults += [f"argument {arg!r}: accepted: flags only, see --help" for arg in positional[1:]]
        for name, stage in self.stages.items():
            if name not in config_files:
                stray = any(owner == name for owner, _, _ in overrides)
                if name in self.optional and not stray:
                    continue
                faults.append(f"--{name}: missing; accepted: a configuration file, e.g. {_EXAMPLES[stage]}")
                continue
            try:
                config = load_config(config_files[name], name)
                _check_stage(config, stage, config_files[name], name)
                mine = [(path, value) for owner, path, value in overrides if owner == name]
                self.overridden[name] = [path for path, _ in mine]
                self._given[name] = (config_files[name], mine)
                faults += apply_overrides(config, mine, name)
                frozen = freeze(config, stage, name)
                self.configs[name] = frozen if name in self.as_given else self._of_run(frozen, stage, name)
            except ConfigError as error:
                faults += [fault for fault in error.faults if fault not in faults]
        if faults:
            leave(faults)
        return positional

    def _of_run(self, given: ImageConfig | LatentConfig, stage: type, name: str) -> ImageConfig | LatentConfig:
        """The configuration of the run that `given` names, or `given` where there is none.

        Raises ConfigError where the command line contradicts the run, or the run cannot be read.
        """
        run = run_path(given)
        try:
            stored = stored_config(run, stage)
        except ValueError as error:
            raise ConfigError([f"--{name}: {' '.join(str(error).split())}"]) from error
        if stored is None:
            return given
        self._runs[name] = run
        try:
            return relocate(stored, given, self.overridden[name], str(run))
        except ConfigError as error:
            raise ConfigError([f"--{name}.{fault}" for fault in error.faults]) from error

    def _help(self) -> str:
        lines = [self.doc.strip(), "", "flags:"]
        own = flags.FLAGS.flags_by_module_dict()
        names = {f.name for module, fs in own.items() if "absl" not in module for f in fs}
        for name in sorted(names):
            flag = flags.FLAGS[name]
            shown = "" if flag.default is None else f" (default {flag.default!r})"
            lines.append(f"  --{name}: {flag.help}{shown}")
        for prefix, stage in self.stages.items():
            lines += ["", f"fields of --{prefix} ({stage.__name__}), set with --{prefix}.SECTION.FIELD=VALUE:"]
            for section in fields(stage):
                for spec in fields(section.type):
                    default = spec.metadata["derived"] or repr(spec.default)
                    choices = spec.metadata["choices"]
                    accepted = f"; one of {', '.join(map(str, choices))}" if choices else ""
                    lines.append(f"  {section.name}.{spec.name}: {spec.metadata['doc']}{accepted} (default {default})")
        return "\n".join(lines)


def stages(argv: Sequence[str]) -> dict[str, type[ImageConfig] | type[LatentConfig]]:
    """The configurations of a command that takes the image model alone, or a sampler with the image model it is of.

    As everywhere, that is `--config IMAGE`, or `--config LATENT --decoder_config IMAGE`; the help shows both.
    """
    both = any(re.match(r"--?((no)?decoder_config|help|h)(\W|$)", arg) for arg in argv)
    return {"config": LatentConfig, "decoder_config": ImageConfig} if both else {"config": ImageConfig}


def define_weights_flags(*names: str) -> None:
    """Flags for which weights are loaded of the runs that these flags name; read by `chosen_weights`."""
    for name in names:
        said = f"weights of the run of --{name}: the newest average, or that with the best held-out loss"
        flags.DEFINE_enum(_weights_flag(name), "newest", tuple(WHICH_WEIGHTS), said)


def chosen_weights(name: str = "config") -> str:
    """Which weights of the run that a flag names the command line asks for: "newest" or "best"."""
    return flags.FLAGS[_weights_flag(name)].value


def _weights_flag(name: str) -> str:
    """ "config" -> "run_weights", "decoder_config" -> "decoder_run_weights"; of another flag NAME, "NAME_weights"."""
    return f"{name.replace('config', 'run')}_weights"


_EXAMPLES = {ImageConfig: "configs/ffhq_256_config.py", LatentConfig: "configs/ffhq_latent_config.py"}


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a user's mistake found while setting up (a `ValueError` or `OSError`) into one line and status 2."""
    try:
        yield
    except ConfigError as error:
        leave(error.faults)
    except (ValueError, OSError) as error:
        leave([" ".join(str(error).split())])
    except FloatingPointError as error:
        leave([str(error)], status=1)


def load_config(path: str, name: str = "config") -> ConfigDict:
    """Run `get_config()` of a configuration file and lock the result.

    Raises:
        ConfigError: when the file does not exist, does not run, or has no `get_config`.
    """
    file = Path(path)
    if not file.is_file():
        known = sorted(str(p) for p in file.parent.glob("*_config.py")) if file.parent.is_dir() else []
        raise ConfigError([f"--{name}={path}: no such file{nearest(path, known) if known else ''}"])
    spec = importlib.util.spec_from_file_location(f"_{name}_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError([f"--{name}={path}: accepted: a Python file that defines get_config()"])
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # a user's file can raise anything; the line must name it
        raise ConfigError([f"--{name}={path}: {type(error).__name__}: {error}"]) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError([f"--{name}={path}: get_config() returned {type(config).__name__}; accepted: ConfigDict"])
    return config.lock()


def _check_stage(config: ConfigDict, stage: type, path: str, name: str) -> None:
    """Raise ConfigError for a configuration of the other stage: one line instead of one for each field."""
    found = stage_of(config)
    if found not in (stage, None):
        raise ConfigError(
            [f"--{name}={path}: holds {found.__name__}; accepted: {stage.__name__}, e.g. {_EXAMPLES[stage]}"]
        )


def apply_overrides(config: ConfigDict, overrides: list[tuple[str, str]], name: str = "config") -> list[str]:
    """Set `section.field` of `config` from text, in order, and return one line per fault."""
    faults = []
    for path, text in overrides:
        section_name, _, key = path.partition(".")
        section = config.get(section_name) if section_name in config else None
        if not isinstance(section, ConfigDict):
            faults.append(f"--{name}.{path}: no such section{nearest(section_name, list(config))}")
        elif key not in section:
            faults.append(f"--{name}.{path}: no such field{nearest(key, list(section))}")
        else:
            try:
                section[key] = _parse_text(text, type(section[key]))
            except ValueError:
                faults.append(f"--{name}.{path}={text}: accepted: {type(section[key]).__name__}")
    return faults


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
        except (SyntaxError, ValueError) as error:
            raise ValueError(text) from error
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return kind(text)


def _split(
    argv: list[str], stages: dict[str, type], rest: list[str], faults: list[str]
) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Sort arguments into configuration files and overrides; what is neither is appended to `rest`."""
    files: dict[str, str] = {}
    overrides: list[tuple[str, str, str]] = []
    queue = list(argv)
    while queue:
        arg = queue.pop(0)
        name, eq, value = arg.lstrip("-").partition("=")
        match = _OVERRIDE.fullmatch(arg)
        follows = bool(queue) and not queue[0].startswith("--")
        if arg.startswith("-") and name in stages:
            if not eq and not follows:
                continue
            files[name] = value if eq else queue.pop(0)
        elif match and match[2] in stages:
            negated, owner, path, text = match.groups()
            if text is None:
                text = "false" if negated else (queue.pop(0) if follows else "true")
            overrides.append((owner, path, text))
        elif match and arg.startswith("--"):
            faults.append(f"{arg}: no such configuration{nearest(match[2], list(stages))}")
        else:
            rest.append(arg)
    return files, overrides
