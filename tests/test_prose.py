"""The prose: links resolve, and what it names exists: files, configuration fields with their values, flags."""

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from configs.schema import ImageConfig, LatentConfig

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted(ROOT.glob("docs/*.md"))]
ROOMS = sorted({path.parent.name for path in ROOT.glob("*/*.py") if path.name != "__init__.py"})
MODULES = {path.name for folder in ROOMS for path in (ROOT / folder).rglob("*.py")} | {
    p.name for p in ROOT.glob("*.py")
}
CONFIGS = {"config", "decoder_config", "latent_config"}
SHARED = [*ROOT.glob("experiments/support/*.py"), ROOT / "runtime/command.py"]  # define flags of several commands
HELP = {"help", "helpfull"}
FOREIGN = {"standalone", "nproc_per_node", "shutdown_timeout", "index-url", "file"}  # of torchrun, pip and conda

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(rf"(?<![\w/.])((?:{'|'.join(ROOMS)}|docs|assets)/[\w./*-]*|(?:\w+/)*\w+\.py)")
_SECTIONS = "|".join(section.name for section in fields(ImageConfig))
_FIELD = re.compile(rf"(?<![\w./])(?:--\w+\.)?({_SECTIONS})\.(\w+)(?:=([^\s`]+))?")
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z][\w-]*)")


def blocks(page: Path) -> list[str]:
    """Fenced blocks that are not Python, with continued lines joined."""
    found = [body for language, body in _FENCE.findall(page.read_text()) if language != "python"]
    return [re.sub(r"\\\n\s*", "", body) for body in found]


def code(page: Path) -> str:
    """All that stands as code, but for Python: commands and what is between backticks."""
    spans = re.findall(r"`([^`\n]+)`", _FENCE.sub("", page.read_text()))
    return "\n".join([*blocks(page), *spans])


def anchors(page: Path) -> set[str]:
    """Names that hosts give to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def flags_of(source: Path) -> set[str]:
    """Names given to functions that define flags: flags.DEFINE_…, add_argument, and define… of this project."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called == "add_argument" or called.lower().startswith("define"):
            first = [arg.values[0] if isinstance(arg, ast.JoinedStr) else arg for arg in node.args]  # f"name={default}"
            names = [arg.value for arg in first if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            found |= {name.partition("=")[0].removeprefix("--") for name in names}
    return found


def defined_flags(*sources: Path) -> set[str]:
    return set().union(*map(flags_of, sources))


def known_values(field, value: str) -> bool:
    """Whether a field takes a value; words in capitals stand for one."""
    value = value.strip("\"'")
    if value.isupper() and field.type is not bool:
        return True
    if field.metadata["choices"]:
        return value in map(str, field.metadata["choices"])
    if field.type is bool:
        return value in ("true", "false")
    if field.type in (int, float):
        return re.fullmatch(r"-?[\d.]+(e-?\d+)?", value) is not None
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for target in _LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    for name in _PATH.findall(page.read_text()):
        path = name.rstrip(".").replace("NAME", "*")
        assert any(ROOT.glob(path)) if "/" in path else path in MODULES, f"{page.name}: {name}"


# In python.md `model` is a variable.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "python.md"], ids=lambda page: page.name)
def test_fields_exist_and_take_their_values(page):
    sections = {(s.name, f.name): f for cls in (LatentConfig, ImageConfig) for s in fields(cls) for f in fields(s.type)}
    for section, name, value in _FIELD.findall(code(page)):
        assert (section, name) in sections, f"{page.name}: {section}.{name}"
        field = sections[section, name]
        assert not value or known_values(field, value), f"{page.name}: {section}.{name}={value}"


# The changelog names flags that are gone.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_flags_exist(page):
    rooms = ("experiments", "benchmarks", "tests/faults")
    commands = [ROOT / "data/prepare.py", *(path for room in rooms for path in ROOT.glob(f"{room}/*.py"))]
    everywhere = defined_flags(*SHARED, *commands)
    for flag in _FLAG.findall(code(page)):
        name = flag if flag in everywhere else flag.removeprefix("no")
        assert name in everywhere | CONFIGS | HELP | FOREIGN, f"{page.name}: --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_their_flags(page):
    for line in "\n".join(blocks(page)).splitlines():
        script = re.search(r"(?<![\w/])((?:experiments|benchmarks)/\w+\.py|data/prepare\.py|train_\w+\.py)(.*)", line)
        if not script:
            continue
        own = defined_flags(ROOT / script[1], *SHARED) | CONFIGS | HELP
        for flag in _FLAG.findall(script[2]):
            assert flag in own or flag.removeprefix("no") in own, f"{page.name}: {script[1]} --{flag}"


def test_every_command_configuration_and_room_is_described():
    text = "\n".join(page.read_text() for page in PAGES)
    scripts = [*ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("train_*.py")]
    scripts.append(ROOT / "data/prepare.py")
    commands = {path.name for path in scripts if "__main__" in path.read_text()}
    models = {re.sub(r"(_latent)?_config$", "", path.stem) for path in ROOT.glob("configs/*_config.py")}
    models = {name for name in models if not name.startswith("ablation_")}
    for name in commands | {f"`{name}`" for name in models}:
        assert name in text, name
    design = (ROOT / "docs/design.md").read_text()
    assert [room for room in ROOMS if f"`{room}/`" not in design] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
