"""A run is checked as a whole before it begins, in a dry run too: every fault with its field, and nothing written."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import micro
from configs.validate import ConfigError
from faults.lines import snapshot
from pictures import noise
from runtime.lock import FolderLock
from runtime.processes import ALONE
from test_commands import ENCODER, PRIOR, flags, run
from test_training import image_trainer
from training.prepare import prepare_image_run, prepare_latent_run

FAULTS = {
    "back end": ({"model.backend": "spconv"}, "model.backend is 'spconv'"),
    "step string": ({"train.plot_sampling_steps": "0"}, "train.plot_sampling_steps: "),
    "attention": ({"model.attention": "flash_attn"}, "model.attention is 'flash_attn'"),
    "tiles": ({"model.tile_points": 5}, "model.tile_points is 5; accepted: "),
    "device": ({"run.device": "abacus"}, "run.device is 'abacus'"),
    "data": ({"data.name": "folder", "data.root_dir": "/nowhere"}, "data.root_dir"),
    "parts": ({"train.accumulate": 3}, "train.batch_size is 4; accepted: multiples of train.accumulate=3"),
    "start": ({"train.init_from": "/nowhere"}, "train.init_from is '/nowhere'"),
    "loggers": ({"run.logger": "wandb,paper"}, "run.logger is 'wandb,paper'; accepted: none, tensorboard, wandb"),
    "package": ({"run.wandb_mode": "offline"}, "run.wandb_mode is 'offline'; accepted"),
}


def faults(config) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        prepare_image_run({"config": config}, ALONE)
    return refused.value.faults


@pytest.mark.parametrize(("changes", "part"), FAULTS.values(), ids=FAULTS)
def test_each_fault_names_its_field(tmp_path, monkeypatch, changes, part):
    for package in ("wandb", "flash_attn", "spconv"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all(part in fault for fault in faults(micro.image(tmp_path, changes)))
    assert not list(tmp_path.iterdir())


def test_all_faults_are_told_at_once(tmp_path):
    several = {key: value for name in ("back end", "step string", "data") for key, value in FAULTS[name][0].items()}
    found = faults(micro.image(tmp_path, several))
    assert len(found) == 3 and not list(tmp_path.iterdir())


def test_images_of_another_size_are_a_fault(tmp_path):
    for i in range(3):
        Image.fromarray(noise((9, 9), i)).save(tmp_path / f"{i}.png")
    (fault,) = faults(micro.image(tmp_path / "runs", {"data.name": "folder", "data.root_dir": str(tmp_path)}))
    assert "data.root_dir" in fault and "9x9" in fault


def test_networks_that_do_not_fit_their_start_are_a_fault(tmp_path):
    source = image_trainer(tmp_path / "source", {"train.steps": 1})
    source.run()
    changes = {"train.init_from": str(source.run_dir.path), "model.nf": 16}
    (fault,) = faults(micro.image(tmp_path / "new", changes))
    assert "train.init_from" in fault and "accepted: a run with the same networks" in fault
    assert prepare_image_run({"config": micro.image(tmp_path / "new", {**changes, "model.nf": 8})}, ALONE)
    (fault,) = faults(micro.image(tmp_path / "source", {"model.z_dim": 5}))
    assert "model.z_dim is 6 there, 5 here" in fault


def test_stage_two_needs_its_autoencoder(tmp_path):
    with pytest.raises(ConfigError) as refused:
        configs = {"config": micro.latent(tmp_path, {"train.plot_sampling_steps": "3"}),
                   "decoder_config": micro.image(tmp_path)}  # fmt: skip
        prepare_latent_run(configs, ALONE)
    (fault,) = refused.value.faults
    assert "micro/weights.safetensors: no such file" in fault and not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_configuration_and_writes_nothing(tmp_path):
    image = flags("config", ENCODER, micro.overrides(tmp_path, micro.IMAGE))
    done = run(["train_inf_ae_diffusion.py", *image, "--dry_run"])
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)["config"]
    assert printed == json.loads(json.dumps(dataclasses.asdict(micro.image(tmp_path)))) and not list(tmp_path.iterdir())

    with FolderLock(tmp_path / "micro"):
        before = snapshot(tmp_path)
        done = run(["train_inf_ae_diffusion.py", *image, "--dry_run"])
        assert done.returncode == 2 and f"micro: in use by process {os.getpid()} on " in done.stderr, done.stderr
        assert snapshot(tmp_path) == before
    (tmp_path / "micro").rmdir()

    prior = flags("config", PRIOR, micro.overrides(tmp_path, micro.LATENT))
    done = run(["train_latent_diffusion.py", *prior, *flags("decoder_config", ENCODER, {"run.root_dir": tmp_path}),
                "--dry_run"])  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "micro/weights.safetensors: no such file" in done.stderr
    assert set(json.loads(done.stdout)) == {"config", "decoder_config"} and not list(tmp_path.iterdir())


def test_metrics_and_previews_go_to_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = image_trainer(tmp_path, {"run.logger": "tensorboard"})
    trainer.run()
    read = events.EventAccumulator(str(Path(trainer.run_dir.path) / "tensorboard"))
    read.Reload()
    lines = [json.loads(line) for line in (trainer.run_dir.path / "metrics.jsonl").read_text().splitlines()]
    assert [(e.step, pytest.approx(e.value)) for e in read.Scalars("loss")] == [(m["step"], m["loss"]) for m in lines]
    (image,) = read.Images("images, mollified, deblurred")
    assert image.step == 6
