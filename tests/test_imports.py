"""Who may import what, and that optional packages stay optional."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = (
    "wandb",
    "tensorboard",
    "lpips",
    "cleanfid",
    "open_clip",
    "torchsparse",
    "spconv",
    "flash_attn",
    "lmdb",
    "netCDF4",
    "matplotlib",
    "triton",
)

# Package -> the project's packages and the third-party ones it may import (anywhere in a file).
ALLOWED = {
    "diffusion": {"diffusion", "configs", "torch", "numpy"},
    "models": {"models", "diffusion", "configs", "torch", "flash_attn", "numpy", "torchsparse", "spconv",
               "triton"},
    "data": {"data", "diffusion", "torch", "numpy", "PIL", "tqdm", "lmdb", "netCDF4"},
    "configs": {"configs", "data", "diffusion", "models", "training", "ml_collections"},
    "runtime": {"runtime", "configs", "data", "absl", "ml_collections", "torch", "torchvision", "safetensors", "tqdm",
                "PIL"},
    "metrics": {"metrics", "runtime", "configs", "data", "diffusion", "torch", "torchvision", "numpy", "PIL", "tqdm",
                "safetensors", "open_clip", "huggingface_hub", "timm", "lpips"},
    "infty_diff": {"infty_diff", "runtime", "configs", "data", "diffusion", "models", "torch", "numpy", "PIL", "tqdm"},
    "training": {"training", "runtime", "configs", "data", "diffusion", "infty_diff", "models", "torch", "safetensors",
                 "tqdm"},
}  # fmt: skip
TOOLS = {"data/prepare.py", "data/prepared.py"}  # a command and its parts; what others import is below them
TRAINER = {"runtime.processes", "configs.schema", "runtime.stored", "diffusion.random", "diffusion.transfer",
           "training.acceleration", "runtime.checkpoint", "training.ema", "training.guard", "training.init_from",
           "training.means", "training.parallel", "runtime.precision", "training.rates", "training.report",
           "runtime.run_dir", "runtime.signals", "training.snapshots", "training.stage", "training.state",
           "configs.validate", "runtime.weights"}  # fmt: skip


def imports(file: Path) -> set[str]:
    """Modules imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module)
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_keep_to_their_layer(package):
    assert files(package)
    for file in files(package):
        if file.relative_to(ROOT).as_posix() in TOOLS:
            continue
        assert not imports(file) & {tool.removesuffix(".py").replace("/", ".") for tool in TOOLS}, file
        for module in imports(file):
            top = module.split(".")[0]
            assert top in ALLOWED[package] or top in sys.stdlib_module_names, f"{file.name} imports {module}"


def test_mathematics_touches_no_file_clock_or_environment():
    for file in files("diffusion"):
        assert not imports(file) & {"os", "pathlib", "io", "time", "random", "logging", "sys"}, file


def messages(file: Path) -> list[str]:
    """The texts of a file that are no docstrings."""
    tree = ast.parse(file.read_text())
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in texts if node not in statements]


def test_only_the_command_line_speaks_of_flags():
    """Who calls a library from Python has none; commands name theirs, as `name="--samples"`."""
    command_line = {ROOT / "runtime" / name for name in ("command.py", "help.py", "overrides.py")}
    command_line |= {ROOT / tool for tool in TOOLS}
    foreign = {("precision.py", "torchrun --nproc_per_node="), ("compiled.py", "--version")}
    said = {(file.name, text) for package in ALLOWED for file in set(files(package)) - command_line
            for text in messages(file) if re.search(r"(^|\W)--([a-z]|$)", text)}  # fmt: skip
    assert {(name, text) for name, text in said if not any(name == n and t in text for n, t in foreign)} == set()


def test_only_factories_read_configurations():
    """Configurations list the choices of those who implement them, so these know no configuration."""
    for file in files("models") + files("diffusion"):
        reads = any(module.startswith("configs") for module in imports(file))
        assert not reads or file.name == "factory.py", file
    listed = {module for file in files("configs") for module in imports(file)}
    assert {m for m in listed if m.startswith("training")} == {"training.power_averages", "training.rates"}
    for name in ("power_averages", "rates"):
        assert not any(module.startswith("configs") for module in imports(ROOT / f"training/{name}.py"))


def test_the_loop_knows_no_stage():
    own = {m for m in imports(ROOT / "training/trainer.py") if m.split(".")[0] in ALLOWED}
    assert own <= TRAINER


def test_everything_imports_without_optional_packages():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for package in ALLOWED
        for file in files(package)
        if not file.name.startswith("triton_")  # kernels, imported only where Triton is
    ]
    modules += [f.stem for f in ROOT.glob("train_*.py")]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"  # None makes an import fail
        "import importlib\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_scripts_are_thin():
    for file in ROOT.glob("train_*.py"):
        assert len(file.read_text().splitlines()) <= 80, file
