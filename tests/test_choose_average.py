"""Averages whose length is chosen after training: their files, going on, and the command that chooses."""

import json
import shutil

import pytest
import torch

import micro
from configs.validate import ConfigError
from runtime.checkpoint import load_newest_checkpoint
from runtime.lock import FolderLock
from runtime.weights import load_weights, save_weights
from test_commands import fails, run
from test_training import everything, image_trainer, latent_trainer
from training.power_averages import exponent
from training.snapshots import FOLDER, Reconstruction, Snapshot, read_snapshots

LENGTHS = (0.1, 0.2)
KEPT = {"train.ema_lengths": LENGTHS, "train.ema_snapshot_steps": 2, "train.ema_snapshot_dtype": "float32"}


def steps(run_folder) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (run_folder / FOLDER).iterdir())


def snapshots(trainer) -> list[Snapshot]:
    return read_snapshots(trainer.run_dir.path, trainer.stage.modules, trainer.run_dir.plain_config)


@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
def test_a_resumed_run_keeps_the_same_averages(tmp_path, make):
    """Also after a kill past the checkpoint: files of steps that are taken again are written again."""
    whole = make(tmp_path / "whole", KEPT)
    whole.run()
    first = make(tmp_path / "parts", {**KEPT, "train.steps": 3})
    first.run()
    shutil.copy(first.run_dir.path / FOLDER / "step_00000002.safetensors",
                first.run_dir.path / FOLDER / "step_00000005.safetensors")  # fmt: skip
    second = make(tmp_path / "parts", KEPT)
    second.run()
    expected, found = everything(whole), everything(second)
    assert sum(name.startswith("/power_averages/values/1") for name in expected) == len(whole.power_averages.values[1])
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert steps(whole.run_dir.path) == [2, 4, 6] and steps(second.run_dir.path) == [2, 3, 4, 6]
    for step in (2, 4, 6):
        one, two = (load_weights(t.run_dir.path / FOLDER / f"step_{step:08d}.safetensors") for t in (whole, second))
        facts = {"step": step, "updates": step, "origin": 0, "lengths": list(LENGTHS)}
        assert facts.items() <= one[1].items() and facts.items() <= two[1].items()
        assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


def test_files_hold_the_weighted_mean_of_all_steps(tmp_path):
    trainer = image_trainer(tmp_path, KEPT)
    seen, step = [], trainer.train_step

    def watched(batch):
        step(batch)
        seen.append(next(iter(trainer.stage.modules["denoiser"].parameters())).detach().double().clone())

    trainer.train_step = watched
    trainer.run()
    name = "denoiser." + next(iter(dict(trainer.stage.modules["denoiser"].named_parameters())))
    tensors, _ = load_weights(trainer.run_dir.path / FOLDER / "step_00000006.safetensors")
    for i, length in enumerate(LENGTHS):
        power = exponent(length) + 1
        weights = [((n + 1) ** power - n**power) / 6**power for n in range(6)]
        expected = sum(weight * theta for weight, theta in zip(weights, seen))
        torch.testing.assert_close(tensors[f"{i}.{name}"].double(), expected, rtol=0, atol=1e-6)
    damaged_ones_are_refused(trainer)
    averages = Reconstruction(snapshots(trainer))
    made = averages.tensors(0.2)
    assert averages.misfit(0.2) < 1e-5 and made.keys() == {key[2:] for key in tensors if key.startswith("1.")}
    for key, value in made.items():
        torch.testing.assert_close(value, tensors[f"1.{key}"], rtol=0, atol=1e-4)


def damaged_ones_are_refused(trainer) -> None:
    """Each in one line that names the file, for whatever is wrong with it."""
    folder = trainer.run_dir.path / FOLDER
    path, whole = folder / "step_00000004.safetensors", (folder / "step_00000004.safetensors").read_bytes()
    tensors, header = load_weights(path)
    name, other = next(iter(tensors)), {"model": {"nf": 9}}
    cases = (
        (tensors, {**header, "step": 3}, "holds averages of step 3; accepted: those of the step in its name"),
        (tensors, {**header, "updates": None}, "holds no averages"),
        (tensors, {**header, "lengths": []}, "holds no averages"),
        (tensors, {"step": 4}, "holds no averages"),
        (tensors, {**header, "config": other}, r"is of another run \(model\.nf is 9 there, 8 here\)"),
        (tensors, {**header, "config": None}, "holds no configuration"),
        ({k: v for k, v in tensors.items() if k != name}, header, f"where {name} is missing there"),
        (
            {**tensors, "1.latent_model.x": torch.ones(2)},
            header,
            r"where 1\.latent_model\.x is \[2\] there, missing here",
        ),
        ({**tensors, name: torch.ones(2, 3)}, header, rf"where {name} is \[2, 3\] there"),
    )
    for changed, facts, said in cases:
        save_weights(path, changed, facts)
        with pytest.raises(ValueError, match=rf"averages/step_00000004\.safetensors(: |, ){said}") as error:
            snapshots(trainer)
        assert "\n" not in str(error.value)
    for content in (whole[:-1], whole[:-50] + bytes(50), b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"averages/step_00000004\.safetensors: "):
            snapshots(trainer)
    path.write_bytes(whole)


def test_by_default_nothing_is_kept(tmp_path):
    trainer = image_trainer(tmp_path)
    trainer.run()
    assert not (trainer.run_dir.path / FOLDER).exists()
    assert load_newest_checkpoint(trainer.run_dir.checkpoints)["power_averages"] == {}
    with pytest.raises(ValueError, match=r"holds no averages; accepted: a run with train\.ema_lengths"):
        snapshots(trainer)


def test_other_lengths_begin_where_they_are_set(tmp_path):
    image_trainer(tmp_path, {**KEPT, "train.steps": 3}).run()
    trainer = image_trainer(tmp_path, {**KEPT, "train.ema_lengths": (0.05, 0.2), "train.ema_snapshot_dtype": "float16"})
    trainer.run()
    found = snapshots(trainer)
    assert steps(trainer.run_dir.path) == [2, 3, 4, 6]
    assert [(s.step, s.updates, s.lengths) for s in found] == [(4, 1, (0.05, 0.2)), (6, 3, (0.05, 0.2))]
    tensors, _ = load_weights(found[0].path)
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_the_number_of_files_is_bounded(tmp_path):
    changes = {"train.steps": 19, "train.checkpoint_steps": 100, "train.plot_samples_steps": 100,
               "train.val_loss_steps": 0, "train.ema_snapshot_steps": 1, "train.ema_snapshots": 4}  # fmt: skip
    trainer = image_trainer(tmp_path, {**KEPT, **changes})
    trainer.run()
    assert steps(trainer.run_dir.path) == [8, 16, 18, 19]


@pytest.mark.parametrize("lengths", [(0.05,), (0.1, 0.1), (0.1, 0.3), (0.0, 0.1), (1, 2), ("a", "b")])
def test_wrong_lengths_are_one_line(tmp_path, lengths):
    with pytest.raises(ConfigError, match=r"train\.ema_lengths") as error:
        micro.image(tmp_path, {"train.ema_lengths": lengths})
    assert len(error.value.faults) == 1


def command(root, *extra: str) -> list[str]:
    place = {"run.root_dir": root, "run.experiment": "micro", "run.device": "cpu"}
    config = ["--config=configs/tiny_config.py", *micro.arguments("config", place)]
    return ["experiments/choose_average.py", *config, *extra]


def losses(text: str) -> dict[str, float]:
    """The table that the command prints: first column -> last."""
    rows = [line.split() for line in text.splitlines() if line.startswith("  ")]
    return {row[0]: float(row[1] if row[0] == "stored" else row[2]) for row in rows[1:]}


def test_the_command_writes_the_best(tmp_path):
    trainer = image_trainer(tmp_path, {**KEPT, "optimizer.learning_rate": 1e-2, "train.ema_decay": 0.0})
    trainer.run()
    path, stage = trainer.run_dir.path / "weights.safetensors", trainer.stage
    before = path.read_bytes()
    listed = run(command(tmp_path, "--lengths=0.1,0.15,0.2,0.01", "--nowrite"))
    assert listed.returncode == 0, listed.stderr
    table = losses(listed.stdout)
    assert path.read_bytes() == before and "nothing written" in listed.stdout
    assert table["stored"] == pytest.approx(stage.held_out_loss(trainer.ema.modules), rel=1e-4)
    fails(command(tmp_path, "--length=0.01"), "--length is 0.01, with a misfit of")
    fails(command(tmp_path, "--lengths=0.1,0.4"), "--lengths is 0.1,0.4: the length of an average is 0.4")

    with FolderLock(path.parent):
        fails(command(tmp_path, "--length=0.15"), "micro: in use by process")
    stored, header = load_weights(path)
    save_weights(path, {**stored, "more": torch.ones(2)}, header)
    fails(command(tmp_path, "--length=0.15"), "weights.safetensors, where more is [2] there, missing here")
    path.write_bytes(before)

    done = run(command(tmp_path, "--length=0.15"))
    assert done.returncode == 0, done.stderr
    tensors, header = load_weights(path)
    assert header["average"]["length"] == 0.15 and header["step"] == 6 and header["config"]["model"]["nf"] == 8
    assert header["average"]["val_loss"] == pytest.approx(table["0.15"], rel=1e-4)
    for name, module in stage.modules.items():
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")})
        module.eval()
    with torch.no_grad():
        assert stage.held_out_loss(stage.modules) == pytest.approx(table["0.15"], rel=1e-4)
    best = run(command(tmp_path, "--lengths=0.1,0.2"))
    wanted = min((loss, length) for length, loss in table.items() if length not in ("stored", "0.01"))[1]
    assert "(length 0.15)" in best.stdout
    assert json.dumps(load_weights(path)[1]["average"]["length"]) == wanted


def test_the_command_takes_stage_two(tmp_path):
    image_trainer(tmp_path).run()
    done = run(["train_latent_diffusion.py", *latent_flags(tmp_path, KEPT)])
    assert done.returncode == 0, done.stderr
    done = run(["experiments/choose_average.py", *latent_flags(tmp_path, {}), "--length=0.2"])
    assert done.returncode == 0, done.stderr
    tensors, header = load_weights(tmp_path / "micro_sampler" / "weights.safetensors")
    assert header["average"]["length"] == 0.2 and header["average"]["test_loss"] > 0
    assert tensors["mean"].dtype == torch.float64


def latent_flags(root, changes) -> list[str]:
    fields = {**(micro.LATENT if changes else {}), "run.root_dir": root, "run.experiment": "micro_sampler",
              "run.device": "cpu", **changes}  # fmt: skip
    decoder = {"run.root_dir": root, "run.experiment": "micro"}
    return ["--config=configs/tiny_latent_config.py", *micro.arguments("config", fields),
            "--decoder_config=configs/tiny_config.py", *micro.arguments("decoder_config", decoder)]  # fmt: skip
