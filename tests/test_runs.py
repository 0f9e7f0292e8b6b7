"""What --config names is a run wherever that run exists: its data and its settings count, in every command."""

import ast
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

import micro
from configs.schema import ImageConfig, LatentConfig
from data.splits import place
from pictures import noise
from runtime.stored import stored_config
from runtime.weights import save_weights
from test_commands import ROOT, run

TINY = "configs/tiny_config.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A run on a folder of pictures, untrained, with four samples."""
    root = tmp_path_factory.mktemp("runs")
    for kind in ("clothing", "samples"):
        for i in range(20 if kind == "clothing" else 4):
            file = root / kind / f"{i:06d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(noise((20, 16), i)).save(file)
    config = micro.image(root, {"data.name": "folder", "data.root_dir": str(root / "clothing"),
                                "data.random_flip": False, "diffusion.gaussian_filter_std": 0.5})  # fmt: skip
    micro.write_run(config)
    return root


def training_images(root: Path) -> list[str]:
    return [name for i in range(20) if place(name := f"{i:06d}.png", "validation") >= 0.05]


def command(script: str, root: Path, *extra: str) -> list[str]:
    where = ["--config", TINY, f"--config.run.root_dir={root}", "--config.run.experiment=micro"]
    return [f"experiments/{script}.py", *where, f"--samples={root / 'samples'}", f"--cache_dir={root / 'cache'}",
            "--device=cpu", *extra]  # fmt: skip


def test_metrics_compare_with_the_data_of_the_run(root, tmp_path):
    fid = ["--model=random_features", f"--json={tmp_path / 'fid.json'}"]
    done = run(command("calculate_fid", root, *fid))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "fid.json").read_text())
    assert report["reference"]["path"] == f"data.name=folder {root / 'clothing'} split train"
    assert report["num_reference"] == len(training_images(root)) and report["reference"]["size"] == [16, 12]
    assert f"the configuration of the run {root / 'micro'}" in done.stderr

    done = run(command("calculate_fid", root, *fid, "--reference_size=18x14"))
    assert json.loads((tmp_path / "fid.json").read_text())["reference"]["size"] == [18, 14], done.stderr

    done = run(command("nearest_neighbours", root, "--metric=pixels", f"--out_dir={tmp_path}"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "pixels.json").read_text())
    assert [entry["images"] for entry in report["training"]] == [len(training_images(root))]  # and not mirrored
    names = {neighbour["image"] for row in report["nearest"] for neighbour in row["neighbours"]}
    assert names <= set(training_images(root))


def test_where_the_data_lie_may_be_said(root, tmp_path):
    (root / "clothing").rename(tmp_path / "moved")
    try:
        moved = f"--config.data.root_dir={tmp_path / 'moved'}"
        done = run(command("calculate_fid", root, "--model=random_features", moved, f"--json={tmp_path / 'fid.json'}"))
    finally:
        (tmp_path / "moved").rename(root / "clothing")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "moved") in json.loads((tmp_path / "fid.json").read_text())["reference"]["path"]


def test_without_a_run_the_file_counts(root, tmp_path):
    other = ["--config.run.experiment=none", "--config.data.num_images=7", f"--json={tmp_path / 'fid.json'}"]
    done = run(command("calculate_fid", root, "--model=random_features", *other))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "fid.json").read_text())
    assert report["reference"]["path"] == "data.name=functions split train" and report["num_reference"] == 7


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["experiments/calculate_fid.py", "--samples=s"], "config"),
        (["experiments/resolution_sweep.py", "--config=configs/tiny_latent_config.py"], "decoder_config"),
    ],
)
def test_contradictions_are_refused_one_line_each(root, command, name):
    contradictions = {"data.name": "functions", "diffusion.gaussian_filter_std": "1.0", "run.seed": "4",
                      "model.nf": "8", "data.num_workers": "1"}  # fmt: skip
    fields = {"run.root_dir": root, "run.experiment": "micro", **contradictions}
    done = run([*command, f"--{name}={TINY}", *micro.arguments(name, fields)])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        f"--{name}.data.name is 'functions'", f"--{name}.diffusion.gaussian_filter_std is 1.0",
        f"--{name}.run.seed is 4",
    ]  # fmt: skip
    assert f"{root / 'micro'} was trained with 'folder'" in lines[0]


def test_every_command_looks_for_the_runs_it_uses():
    """Exceptions are the runs that a command makes, and benchmarks, which take no run."""
    given = {}
    for file in [*ROOT.glob("train_*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Command":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                given[file.stem] = options.get("as_given", "()")
    assert len(given) >= 14
    assert {name: names for name, names in given.items() if names != "()"} == {
        "train_inf_ae_diffusion": "('config',)",
        "train_latent_diffusion": "('config',)",
        "coordinate_sparsity": "('config', 'decoder_config')",
        "import_reference_checkpoint": "tuple(stages)",
        "other_library": "('config',)",
        "sampling": "('config',)",
        "train_step": "('config',)",
    }


def test_configurations_of_runs(tmp_path):
    image = micro.image(tmp_path)
    assert stored_config(tmp_path / "none", ImageConfig) is None
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text(json.dumps(asdict(image)))
    assert stored_config(tmp_path / "begun", ImageConfig) == image
    with pytest.raises(ValueError, match="begun: is a run of ImageConfig; accepted: a run of LatentConfig"):
        stored_config(tmp_path / "begun", LatentConfig)
    save_weights(tmp_path / "begun" / "weights.safetensors", {"w": torch.zeros(1)}, {"config": asdict(image)})
    (tmp_path / "begun" / "config.json").write_text("{")
    assert stored_config(tmp_path / "begun", ImageConfig) == image  # that of the weights
    (tmp_path / "begun" / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.safetensors: not a readable safetensors file"):
        stored_config(tmp_path / "begun", ImageConfig)
    (tmp_path / "begun" / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"config\.json: holds no JSON"):
        stored_config(tmp_path / "begun", ImageConfig)
    for text, said in {"[]": "an array", "null": "null", "3": "a number", '{"run": 3}': "no configuration"}.items():
        (tmp_path / "begun" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"begun/config\.json: holds {said}; accepted: "):
            stored_config(tmp_path / "begun", ImageConfig)
