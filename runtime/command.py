"""Command lines: `--config=FILE --config.section.field=value`, other flags by absl, readable errors.

Overrides follow ml_collections; unlike its flag parser this one reports every fault of the command line
at once, one line each, and leaves with status 2.
"""

import contextlib
import json
import logging
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict

from configs.effects import in_vain, training_only
from configs.schema import ImageConfig, LatentConfig
from configs.validate import ConfigError, freeze, one_line
from runtime.help import field_lines, flag_lines, show
from runtime.lock import trial
from runtime.overrides import apply_overrides, expanded, load_config, split_arguments
from runtime.processes import Processes, leave
from runtime.saved import saved_config
from runtime.stored import relocate, run_path, stage_of, stored_config

_log = logging.getLogger(__name__)


class Command:
    """A script's command line: which configuration files it takes and of which stage each is.

    Args:
        doc: the help text (the script's docstring).
        configs: flag name -> stage, for example {"config": LatentConfig, "decoder_config": ImageConfig}.
        optional: the names among them that may be left out, and are then absent from what `run` hands on.
        as_given: the names whose run the command makes or goes on with, or does not look for. Fields of training alone
            are accepted of these only.

    What any other name stands for is a run, wherever that run exists: its stored configuration is handed on, with what
    the command line says of fields that do not shape what was trained; what contradicts it is refused. Where there
    is no run yet, file and command line count. Where a command has the flag --saved_model, a saved model takes the
    place of those names in the same way.
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
        self._given: dict[str, tuple[str, list[tuple[str, str]]]] = {}  # a file or a saved model, overrides
        for name, stage in configs.items():
            flags.DEFINE_string(name, None, f"{stage.__name__} file, e.g. {_EXAMPLES[stage]}")
        flags.DEFINE_bool(
            "dry_run", False, "print the resolved configuration, name what would stop the command, and stop"
        )

    def run(self, main: Callable[[dict[str, Any], dict[str, list[str]]], None], *, claims: bool = False) -> None:
        """Parse `sys.argv`, print the resolved configuration under --dry_run, else call `main(configs, overridden)`.

        `configs` holds the frozen configurations by flag name, `overridden` the fields set on the command line. Under
        torchrun rank 0 calls `main`, and the others wait. claims: as for `run_in_all`.
        """
        self.run_in_all(lambda *given, processes: main(*given) if processes.is_rank_0 else None, claims=claims)

    def run_in_all(
        self, main: Callable[..., None], prepare: Callable[..., Any] | None = None, *, claims: bool = False
    ) -> None:
        """As `run`, but under torchrun all processes call `main(configs, overridden, processes=…)`.

        prepare: called first as `prepare(configs, processes)`, under --dry_run too. It raises ConfigError or ValueError
        for whatever would stop `main`, and writes nothing. Then `main(prepared, command)` is called, with what it
        returned and this command.
        claims: `main` claims the folder of its results before it writes anything. Under --dry_run of one process it is
            called too, up to there.
        """
        with readable_errors():
            processes = Processes.from_environment()

        def body(_: list[str]) -> None:
            level = logging.INFO if processes.is_rank_0 else logging.WARNING
            logging.basicConfig(level=level, format="%(message)s", force=True)
            dry = flags.FLAGS.dry_run
            if dry and processes.is_rank_0 and self.stages:
                plain = {name: asdict(config) for name, config in self.configs.items()}
                show([json.dumps(plain, indent=2, allow_nan=False)])
            for name, run in self._runs.items():
                _log.info("--%s: the configuration of the run %s", name, run)
            try:
                if prepare is not None:
                    with readable_errors():
                        prepared = prepare(self.configs, processes)
                    if not dry:
                        main(prepared, self)
                elif not dry:
                    main(self.configs, self.overridden, processes=processes)
                elif claims and processes.world_size == 1:
                    with trial():
                        main(self.configs, self.overridden, processes=processes)
            except KeyboardInterrupt:  # met by every process, at any point: too late to agree on anything
                _interrupted(processes)
            processes.agree()

        def parse(argv: list[str]) -> list[str]:
            try:
                with readable_errors():
                    return self._parse(argv, processes)
            except KeyboardInterrupt:
                _interrupted(processes)

        with processes.connected():
            app.run(body, flags_parser=parse)

    def file(self, name: str) -> str:
        """The file given for a configuration."""
        return self._given[name][0]

    def place(self, name: str, as_name: str, experiment: str = "") -> list[str]:
        """As `arguments`, but of the overrides only where the run is and computes, all one needs of a run that exists.

        experiment: another name of the run, if it is not to be its own.
        """
        overrides = self._given[name][1]
        wanted = {path: value for path, value in overrides if path in ("run.root_dir", "run.device")}
        wanted["run.experiment"] = experiment or self.configs[name].run.experiment
        return [self._source(name, as_name), *(f"--{as_name}.{path}={value}" for path, value in wanted.items())]

    def arguments(self, name: str, as_name: str, changes: dict[str, Any], trains: bool = True) -> list[str]:
        """A configuration as it was given, with changes, for the command line of a command that calls it `as_name`.

        trains: whether that command trains what the configuration describes; others take no fields of training alone.
        """
        overrides = self._given[name][1]
        fields = [(path, value) for path, value in (*overrides, *changes.items()) if trains or not training_only(path)]
        return [self._source(name, as_name), *(f"--{as_name}.{path}={value}" for path, value in fields)]

    def _source(self, name: str, as_name: str) -> str:
        return f"--{'saved_model' if _saved_model() else as_name}={self._given[name][0]}"

    def _parse(self, argv: list[str], processes: Processes) -> list[str]:
        faults: list[str] = []
        rest = argv[:1]
        config_files, overrides = split_arguments(argv[1:], self.stages, rest, faults)
        for arg in rest:
            if arg.lstrip("-") in ("help", "h", "helpfull", "helpshort") and arg.startswith("-"):
                if processes.is_rank_0:
                    with readable_errors():
                        show(self._help(config_files, overrides, full=arg.endswith("full")))
                sys.exit(0)
        try:
            positional = flags.FLAGS(rest)
        except flags.Error as error:
            leave([*faults, one_line(error)])
        faults += _flag_faults()
        faults += [f"argument {arg!r}: accepted: flags only, see --help" for arg in positional[1:]]
        saved = _saved_model()
        for name, stage in self.stages.items():
            if saved and name in config_files:
                faults.append(f"--saved_model, --{name}; accepted: one of them")
                continue
            if not saved and name not in config_files:
                stray = any(owner == name for owner, _, _ in overrides)
                if name in self.optional and not stray:
                    continue
                instead = ", or --saved_model" if "saved_model" in flags.FLAGS else ""
                faults.append(f"--{name}: missing; accepted: a configuration file, e.g. {_EXAMPLES[stage]}{instead}")
                continue
            try:
                source = saved or config_files[name]
                config = _saved_config(saved, stage) if saved else load_config(source, name)
                _check_stage(config, stage, source, name)
                mine = [(path, value) for owner, path, value in overrides if owner == name]
                self.overridden[name] = [path for path, _ in mine]
                self._given[name] = (source, mine)
                wrong = apply_overrides(config, mine, name)
                faults += wrong
                frozen = freeze(config, stage, name)
                if not wrong:
                    known = name in self.as_given
                    self.configs[name] = frozen if known else self._of_run(frozen, stage, name, saved)
                    faults += in_vain(self.configs[name], self.overridden[name], known, f"--{name}")
            except ConfigError as error:
                faults += [fault for fault in error.faults if fault not in faults]
        if faults:
            leave(faults)
        return positional

    def _of_run(
        self, given: ImageConfig | LatentConfig, stage: type, name: str, saved: str | None
    ) -> ImageConfig | LatentConfig:
        """The configuration of the saved model, or of the run that `given` names, or `given` where there is none.

        Raises ConfigError where the command line contradicts the run, or the run cannot be read.
        """
        run = Path(saved) if saved else run_path(given)
        try:
            stored = saved_config(saved, stage) if saved else stored_config(run, stage)
        except ValueError as error:
            raise ConfigError([f"--{name}: {' '.join(str(error).split())}"]) from error
        if stored is None:
            return given
        if not saved:
            self._runs[name] = run
        try:
            return relocate(stored, given, self.overridden[name], str(run))
        except ConfigError as error:
            raise ConfigError([f"--{name}.{fault}" for fault in error.faults]) from error

    def _help(self, files: dict[str, str], overrides: list[tuple[str, str, str]], full: bool) -> list[str]:
        own = [*self.stages, *(["saved_model"] if "saved_model" in flags.FLAGS else []), "dry_run"]
        lines = [self.doc.strip(), "", "flags:", *flag_lines(own)]
        if not self.stages:
            return lines
        if not full:
            return [*lines, "", "Fields of configurations: --helpfull, with --config=FILE for the values of that file."]
        for name, stage in self.stages.items():
            given = load_config(files[name], name) if name in files else None
            if given is not None:
                _check_stage(given, stage, files[name], name)
                faults = apply_overrides(
                    given, [(path, text) for owner, path, text in overrides if owner == name], name
                )
                if faults:
                    raise ConfigError(faults)
            lines += ["", *field_lines(name, stage, given)]
        return lines


def _saved_model() -> str | None:
    return flags.FLAGS.saved_model if "saved_model" in flags.FLAGS else None


def _saved_config(saved: str, stage: type) -> ConfigDict:
    try:
        return ConfigDict(asdict(saved_config(saved, stage))).lock()
    except ValueError as error:
        raise ConfigError([f"--saved_model: {one_line(error)}"]) from None


def _check_stage(config: ConfigDict, stage: type, path: str, name: str) -> None:
    """Raise ConfigError for a configuration of the other stage: one line instead of one for each field."""
    found = stage_of(config)
    if found not in (stage, None):
        raise ConfigError(
            [f"--{name}={path}: holds {found.__name__}; accepted: {stage.__name__}, e.g. {_EXAMPLES[stage]}"]
        )


def _interrupted(processes: Processes) -> NoReturn:
    if processes.is_rank_0:
        print("error: interrupted; the same command goes on from here", file=sys.stderr)
    sys.exit(130)


def _flag_faults() -> list[str]:
    """Expand ~ in flags; return a line for each that cannot be, is empty, or is nan, which bounds let pass."""
    faults = []
    for flag in [flags.FLAGS[name] for name in flags.FLAGS]:
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            faults.append(f"--{flag.name} is {flag.value}; accepted: a finite number")
        elif flag.value in ("", []) and flag.present and "empty = " not in flag.help:
            faults.append(f"--{flag.name} is ''; accepted: {flag.help}, or no such flag")
        elif isinstance(flag.value, str):
            try:
                flag.value = expanded(flag.value, flag.name)
            except ConfigError as error:
                faults += error.faults
    return faults


def shell_line(script: str, *arguments: str) -> str:
    """The command line of a script of this repository, to be pasted into a shell."""
    return shlex.join(["python", script, *arguments])


def stages(argv: Sequence[str], sampler: str = "--seeds") -> dict[str, type[ImageConfig] | type[LatentConfig]]:
    """The configurations of a command that takes the image model alone, or a sampler with the image model it is of.

    As everywhere, that is `--config IMAGE`, or `--config LATENT --decoder_config IMAGE`; the help shows both. Of a
    saved model the sampler is taken where the arguments hold the words `sampler`.
    """
    words = [word for arg in argv for word in (arg, *arg.split("=", 1))]  # a value stands after = or by itself
    names = {match[1] for arg in argv if (match := re.match(r"--?(\w+)", arg))}
    both = bool(names & {"decoder_config", "nodecoder_config", "help", "helpfull", "helpshort", "h"})
    both |= "saved_model" in names and all(word in words for word in sampler.split())
    return {"config": LatentConfig, "decoder_config": ImageConfig} if both else {"config": ImageConfig}


_EXAMPLES = {ImageConfig: "configs/ffhq_256_config.py", LatentConfig: "configs/ffhq_latent_config.py"}


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn a user's mistake found while setting up (a `ValueError` or `OSError`) into one line and status 2."""
    try:
        yield
    except ConfigError as error:
        leave(error.faults)
    except (ValueError, OSError) as error:
        leave([one_line(error)])
    except FloatingPointError as error:
        leave([str(error)], status=1)
