"""The commands as users type them: all three stages on a folder of images, and wrong input."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import micro
from data.functions import ProceduralFunctions
from data.pixels import to_uint8
from forked import ROOT, run

IMAGES = {**micro.IMAGE, "data.name": "ffhq"}
ENCODER = ["configs/ffhq_256_config.py", "micro"]
PRIOR = ["configs/ffhq_latent_config.py", "micro_sampler"]


def flags(name: str, stage: list[str], fields: dict) -> list[str]:
    file, experiment = stage
    return [f"--{name}", file, *micro.arguments(name, {"run.experiment": experiment, **fields})]


def stage_one(root: Path, changes: dict | None = None) -> list[str]:
    fields = micro.overrides(root, IMAGES, {"data.root_dir": root / "images", **(changes or {})})
    return ["train_inf_ae_diffusion.py", *flags("config", ENCODER, fields)]


def stage_two(root: Path, changes: dict | None = None) -> list[str]:
    decoder = {"run.root_dir": root, "data.root_dir": root / "images"}
    fields = micro.overrides(root, micro.LATENT, changes)
    return ["train_latent_diffusion.py", *flags("config", PRIOR, fields), *flags("decoder_config", ENCODER, decoder)]


def sampling(root: Path, *extra: str) -> list[str]:
    place = {"run.root_dir": root, "run.device": "cpu", "data.fid_samples": 3}
    return ["experiments/generate_samples.py", *flags("config", PRIOR, place),
            *flags("decoder_config", ENCODER, {"run.root_dir": root}), *extra]  # fmt: skip


def fails(command: list[str], part: str) -> None:
    """The command must leave with status 2 and one line that holds `part`."""
    done = run(command)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0] and "Traceback" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of images and the two trained stages."""
    root = tmp_path_factory.mktemp("commands")
    (root / "images").mkdir()
    functions = ProceduralFunctions(seed=3)
    for i in range(12):
        pixels = to_uint8(functions.evaluate(i, (32, 24))).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "images" / f"{i:05d}.png")
    stages = ((stage_one(root), "train_latent_diffusion.py"), (stage_two(root), "experiments/generate_samples.py"))
    for command, following in stages:
        done = run(command)
        assert done.returncode == 0, done.stderr
        told = dict(line.split(maxsplit=1) for line in done.stderr.splitlines() if line[:1].isalpha() and " " in line)
        assert told["weights"].endswith("weights.safetensors") and Path(told["weights"]).is_file()
        assert told["parameters"] and told["device"] == "cpu, float32" and " held out" in told["data"]
        assert re.search(r"step 6/6 .* images/s  0:00:00 left", done.stderr)
        pasted = shlex.split(told["next"])
        assert pasted[1] == following and run([*pasted[1:], "--dry_run"]).returncode == 0, told["next"]
    return root


def logged(run_folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines]


def test_the_three_commands_make_their_files(root):
    for name in ("micro", "micro_sampler"):
        files = {path.name for path in (root / name).iterdir()}
        assert {"config.json", "metrics.jsonl", "images", "checkpoints", "weights.safetensors"} <= files
        assert logged(root / name) == [1, 2, 3, 4, 5, 6]
    assert len(list((root / "micro" / "latents").glob("*.safetensors"))) == 1
    done = run(sampling(root, "--sample_img_size=24x40", "--sampling_steps=3", "--latent_sampling_steps=5"))
    assert done.returncode == 0, done.stderr
    folder = root / "micro_sampler" / "samples" / "24x40_ddim3_latent5"
    assert {path.name for path in folder.glob("0*.png")} == {"000000.png", "000001.png", "000002.png"}
    assert np.array(Image.open(folder / "000002.png")).shape == (24, 40, 3)
    again = run(sampling(root, "--sample_img_size=24x40", "--sampling_steps=3", "--latent_sampling_steps=5"))
    assert again.stdout.startswith("0 images drawn, 3 were there")


def test_interrupt_of_a_whole_terminal_saves_first(root):
    """Ctrl-C reaches the decoding processes too; the run must still save what it has."""
    endless = {"run.experiment": "interrupted", "data.in_memory": "never", "data.num_workers": 2}
    endless |= {name: 100_000 for name in ("train.steps", "train.checkpoint_steps", "train.plot_samples_steps")}
    command = [sys.executable, *stage_one(root, endless)]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    metrics = root / "interrupted" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in errors, errors
    assert len(list((root / "interrupted" / "checkpoints").glob("step_*.pt"))) == 1


def test_wrong_input_is_one_line(root, tmp_path):
    fails(stage_one(root, {"data.root_dir": tmp_path / "none", "run.experiment": "new"}), "none")
    assert not (root / "new").exists()
    fails(stage_one(root, {"model.nf": 16}), "model.nf is 8 there, 16 here")
    fails(stage_one(root, {"model.backend": "torchspars", "run.experiment": "new"}), "model.backend")
    fails(sampling(root, "--sample_img_size=12by9"), "--sample_img_size is '12by9'")
    fails(sampling(root, "--sampling_steps=0"), "'0'")
    fails(sampling(root, "--decoder_config.run.experiment=missing"), "missing/weights.safetensors: no such file")


def test_an_override_that_contradicts_the_trained_run_is_refused(root):
    fails([*stage_two(root), "--decoder_config.model.nf=16"], "was trained with 8")
    fails(sampling(root, "--decoder_config.model.nf=16"), "was trained with 8")
    fails(sampling(root, "--config.diffusion.steps=700"), "was trained with")
    fails(sampling(root, "--decoder_config.model.tile_points=5", "--sampling_steps=2"), "model.tile_points is 5")
