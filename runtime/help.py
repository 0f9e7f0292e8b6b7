"""The help of a command: its own flags, and on `--helpfull` every field of its configurations."""

import os
import sys
from dataclasses import fields

from absl import flags
from ml_collections import ConfigDict

from configs.schema import sections


def flag_lines(own: list[str]) -> list[str]:
    """One line per flag that the project defines, the names `own` first."""
    modules = flags.FLAGS.flags_by_module_dict()
    others = {flag.name for module, those in modules.items() if "absl" not in module for flag in those} - {*own}
    lines = []
    for name in [*own, *sorted(others)]:
        flag = flags.FLAGS[name]
        shown = "" if flag.default is None or flag.default is False else f" (default {flag.default})"
        lines.append(f"  --{name}: {flag.help}{shown}")
    return lines


def field_lines(name: str, stage: type, given: ConfigDict | None) -> list[str]:
    """One line per field of a configuration, with its value in the given one, else its default."""
    lines = [f"fields of --{name} ({stage.__name__}), set with --{name}.SECTION.FIELD=VALUE:"]
    for part, section in sections(stage).items():
        for spec in fields(section):
            rule = spec.metadata
            value = (rule["derived"] or repr(spec.default)) if given is None else repr(given[part][spec.name])
            accepted = f"; one of {', '.join(map(str, rule['choices']))}" if rule["choices"] else ""
            lines.append(f"  {part}.{spec.name}: {rule['doc']}{accepted} (default {value})")
    return lines


def show(lines: list[str]) -> None:
    """Print to a reader who may leave early, as `head` does."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
