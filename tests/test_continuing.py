"""Runs that go on with other settings, start from other runs, and keep their best weights."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

import micro
from configs.schema import ImageConfig, LatentConfig
from diffusion.random import Purpose, stream
from runtime.checkpoint import load_checkpoint, load_newest_checkpoint, save_checkpoint
from runtime.processes import Processes
from runtime.run_dir import RunDir
from runtime.saved import IMAGE, LATENT
from runtime.stored import BEST_WEIGHTS, SHAPING
from runtime.weights import load_weights, save_weights
from test_training import CPU, everything, image_trainer, latent_trainer, metrics
from training.init_from import fitting_weights
from training.state import restore

CHANGED = {
    "optimizer.learning_rate": 1e-4, "optimizer.adam_beta1": 0.5, "optimizer.weight_decay": 0.1,
    "optimizer.warmup_steps": 8, "optimizer.gradient_skip": True, "train.batch_size": 2, "train.amp": False,
    "train.amp_dtype": "bfloat16", "train.ema_decay": 0.5, "train.ema_update_every": 2, "train.gradient_clip": 0.1,
    "data.random_flip": False, "train.plot_graph_steps": 2, "train.recompute": True, "model.backend": "torch_dense",
    "train.val_loss_steps": 4, "data.on_error": "skip",
}  # fmt: skip


def history(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.run_dir.path / "history.jsonl").read_text().splitlines()]


def test_settings_that_shape_nothing_change_on_resume(tmp_path, caplog):
    before = micro.image(tmp_path, {"train.steps": 3})
    first = image_trainer(tmp_path, {"train.steps": 3})
    first.run()
    assert not (first.run_dir.path / "history.jsonl").exists()
    with caplog.at_level(logging.INFO):
        second = image_trainer(tmp_path, CHANGED)
        second.run()
    (entry,) = history(second)
    assert entry["step"] == 3 and entry["changed"].keys() == {*CHANGED, "train.steps"}
    for field, value in CHANGED.items():
        section, name = field.split(".")
        old = getattr(getattr(before, section), name)
        assert entry["changed"][field] == [old, value]
        assert f"{field} is {value!r} from step 3 on, {old!r} before" in caplog.text
    in_force = json.loads((second.run_dir.path / "config.json").read_text())
    assert in_force["optimizer"]["learning_rate"] == 1e-4 and in_force["train"]["batch_size"] == 2
    last = metrics(second)[-1]
    assert last["learning_rate"] == pytest.approx(1e-4 * 6 / 8) and last["images"] == 3 * 4 + 3 * 2
    (group,) = second.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.99), 0.1) and second.ema.decay == 0.5


def test_the_moments_go_on(tmp_path):
    """One step after a resume is AdamW's formula with the moments kept and the rates that are configured now."""
    image_trainer(tmp_path, {"train.steps": 3}).run()
    trainer = image_trainer(tmp_path, {"optimizer.learning_rate": 1e-2, "optimizer.adam_beta1": 0.3,
                                       "optimizer.weight_decay": 0.2, "train.gradient_clip": 0.0})  # fmt: skip
    trainer._resume()
    kept = load_checkpoint(trainer.run_dir.checkpoints, 3)["optimizer"]["state"][0]
    weight = trainer.optimizer.param_groups[0]["params"][0]
    theta = weight.detach().double().clone()
    trainer.train_step(next(trainer.stage.batches(trainer.seen)))
    g = weight.grad.double()
    m = 0.3 * kept["exp_avg"].double() + 0.7 * g
    v = 0.99 * kept["exp_avg_sq"].double() + 0.01 * g**2
    update = m / (1 - 0.3**4) / ((v / (1 - 0.99**4)).sqrt() + 1e-8)
    expected = theta * (1 - 1e-2 * 0.2) - 1e-2 * update
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("changes", "said"), [
    ({"model.nf": 16, "run.seed": 1}, "run.seed is 0 there, 1 here; model.nf is 8 there, 16 here"),
    ({"diffusion.noise_schedule": "linear"}, "diffusion.noise_schedule is 'cosine' there"),
    ({"mc_integral.ratio": 0.5, "mc_integral.q_sample": 96}, "mc_integral.ratio is 0.25 there, 0.5 here"),
    ({"data.num_images": 25}, "data.num_images is 24 there, 25 here"),
    ({"train.init_from": "elsewhere"}, "train.init_from is '' there, 'elsewhere' here"),
])  # fmt: skip
def test_what_shapes_is_refused(tmp_path, changes, said):
    image_trainer(tmp_path, {"train.steps": 1}).run()
    with pytest.raises(ValueError, match="holds a run with another configuration") as error:
        RunDir(micro.image(tmp_path, changes), resume=True)
    assert said in str(error.value)
    assert not (tmp_path / "micro" / "history.jsonl").exists()


def test_a_field_shapes_in_both_stages_or_in_none():
    flags: dict[str, set[bool]] = {}
    for stage in (ImageConfig, LatentConfig):
        for section in dataclasses.fields(stage):
            for field in dataclasses.fields(section.type):
                flags.setdefault(f"{section.name}.{field.name}", set()).add(field.metadata["shapes"])
    assert all(len(found) == 1 for found in flags.values())
    assert SHAPING == {name for name, found in flags.items() if True in found}
    assert not any(name.startswith("optimizer.") for name in SHAPING)
    assert {name for name in SHAPING if name.startswith("train.")} == {"train.init_from"}
    free = {name for name in flags if name.startswith(("model.", "diffusion.", "mc_integral.")) and name not in SHAPING}
    assert free == {"model.backend", "model.attention", "model.tile_points", "diffusion.final_estimate"}


def test_a_state_of_another_version_is_one_line(tmp_path):
    trainer = image_trainer(tmp_path, {"train.steps": 1})
    trainer.run()
    state = load_checkpoint(trainer.run_dir.checkpoints, 1)
    del state["guard"], state["seen"]
    save_checkpoint(trainer.run_dir.checkpoints, 1, state, keep=1)
    with pytest.raises(ValueError, match=r"of another version, without guard, seen; accepted: another run\.experiment"):
        image_trainer(tmp_path).run()


@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
def test_a_run_starts_from_the_ema_weights_of_another(tmp_path, make, caplog):
    source = make(tmp_path / "source")
    source.run()
    tensors, _ = load_weights(source.run_dir.path / "weights.safetensors")
    changes = {"train.init_from": str(source.run_dir.path), "train.steps": 2, "train.ema_decay": 0.9}
    with caplog.at_level(logging.INFO):
        trainer = make(tmp_path / "new", changes)
        origin = trainer._resume()
    for name, module in trainer.stage.modules.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, tensors[f"{name}.{key}"])
            assert torch.equal(value, trainer.ema.modules[name].state_dict()[key])
    assert trainer.step == trainer.ema.updates == 0 and not trainer.optimizer.state
    count = sum(len(module.state_dict()) for module in trainer.stage.modules.values())
    assert sum(origin["tensors"].values()) == count and origin["weights_step"] == 6
    (line,) = [r.message for r in caplog.records if r.message.startswith("starting from")]
    assert "EMA weights of step 6" in line and "EMA, optimiser, steps" in line
    assert ("mean, std are this run's own" in line) == (make is latent_trainer)

    own, other = (LATENT, IMAGE) if make is latent_trainer else (IMAGE, LATENT)
    (tmp_path / other).write_bytes(b"of the other stage")
    shutil.copy(source.run_dir.path / "weights.safetensors", tmp_path / own)
    assert fitting_weights(str(tmp_path), trainer.stage.modules)[1].keys() == tensors.keys()

    trainer.run()
    assert history(trainer)[0] == {"step": 0, **origin}
    shutil.rmtree(source.run_dir.path)  # continuing does not read it again
    again = make(tmp_path / "new", {**changes, "train.steps": 4})
    again.run()
    assert metrics(again)[-1]["step"] == 4


@pytest.mark.parametrize(("changes", "said"), [
    ({"model.nf": 16}, r"is \[.*\] there, \[.*\] here and \d+ more; accepted: a run with the same networks"),
    ({"model.num_conv_blocks": 2}, r"is missing there, \[.*\] here and \d+ more"),
    ({"train.init_from": "nowhere"}, "train.init_from is 'nowhere', but nowhere is no run and no model"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_one_line(tmp_path, changes, said):
    source = image_trainer(tmp_path / "source", {"train.steps": 1})
    source.run()
    trainer = image_trainer(tmp_path / "new", {"train.init_from": str(source.run_dir.path), **changes})
    before = {name: value.clone() for name, value in trainer.stage.modules["encoder"].state_dict().items()}
    with pytest.raises(ValueError, match=said):
        trainer.run()
    if not isinstance(changes.get("train.init_from"), str):
        tensors, header = load_weights(source.run_dir.path / "weights.safetensors")
        save_weights(source.run_dir.path / "weights.safetensors", {**tensors, "mean": torch.ones(2)}, header)
        with pytest.raises(ValueError, match=r"weights\.safetensors, where mean is \[2\] there, missing here"):
            fitting_weights(str(source.run_dir.path), source.stage.modules)
    assert all(torch.equal(value, before[k]) for k, value in trainer.stage.modules["encoder"].state_dict().items())
    assert not trainer.run_dir.path.exists()


def test_held_out_loss_is_the_loss_of_the_ema_weights_with_fixed_draws(tmp_path):
    changes = {"model.stochastic_encoding": True, "model.learn_sigma": True, "model.uno_dropout": 0.5,
               "data.val_ratio": 0.9}  # fmt: skip
    trainer = image_trainer(tmp_path, changes)
    trainer.run()
    stage, averaged = trainer.stage, trainer.ema.modules
    found = [(line["step"], line["val_loss"]) for line in metrics(trainer) if "val_loss" in line]
    assert [step for step, _ in found] == [2, 4, 6]
    assert len(stage.val_set) == 22
    stage.modules, total = averaged, 0.0
    with torch.no_grad():
        for i, images in enumerate((stage.val_set.pixels[:16], stage.val_set.pixels[16:])):
            draws = stage.draw(stream(0, Purpose.HELD_OUT_IMAGES, i), len(images))
            total += len(images) * stage.loss(images, draws)[0].item()
    assert found[-1][1] == pytest.approx(total / 22, rel=1e-5)
    assert stage.held_out_loss(averaged) == found[-1][1]


def test_held_out_loss_is_of_so_many_images_and_no_part_of_training(tmp_path):
    plain = image_trainer(tmp_path / "plain", {"train.val_loss_steps": 0, "model.uno_dropout": 0.5})
    plain.run()
    trainer = image_trainer(tmp_path / "held", {"train.val_images": 1, "model.uno_dropout": 0.5})
    trainer.run()
    assert not any("val_loss" in line for line in metrics(plain))
    assert not (plain.run_dir.path / BEST_WEIGHTS).exists()
    one, other = everything(plain), everything(trainer)
    assert all(torch.equal(one[key], other[key]) for key in one)
    with torch.no_grad():
        trainer.stage.modules = trainer.ema.modules
        draws = trainer.stage.draw(stream(0, Purpose.HELD_OUT_IMAGES, 0), 1)
        first = trainer.stage.loss(trainer.stage.val_set.pixels[:1], draws)[0].item()
    assert metrics(trainer)[-1]["val_loss"] == pytest.approx(first, rel=1e-5)


def test_a_line_says_where_several_processes_begin_to_draw_for_the_whole_batch(tmp_path, caplog):
    trainer = image_trainer(tmp_path, {"train.steps": 1})
    trainer.run()
    state = load_newest_checkpoint(trainer.run_dir.checkpoints)
    earlier = {key: value for key, value in state.items() if key != "draws"}
    for one, count, told in ((state, 2, False), (earlier, 1, False), (earlier, 2, True)):
        caplog.clear()
        trainer.processes = Processes(0, count)
        with caplog.at_level(logging.INFO):
            restore(trainer, one, "state")
        assert ("from step 1 on, random numbers are drawn for the whole batch" in caplog.text) == told


def test_without_held_out_images_a_line_says_so(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = image_trainer(tmp_path, {"data.val_ratio": 0.0})
        trainer.run()
    assert "no images are held out (data.val_ratio=0): no val_loss, no best_weights.safetensors" in caplog.text
    assert not any("val_loss" in line for line in metrics(trainer))
    assert not (trainer.run_dir.path / BEST_WEIGHTS).exists()


@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
def test_the_best_weights_are_kept_through_a_resume(tmp_path, make):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: torch.nan, 10: 0.5}
    averages = {}

    def run(steps):
        trainer = make(tmp_path, {"train.steps": steps})

        def scripted(averaged):
            averages[trainer.step] = {k: v.clone() for k, v in trainer.stage.weights(averaged).items()}
            return losses[trainer.step]

        trainer.stage.held_out_loss = scripted
        trainer.run()
        name = {image_trainer: "val_loss", latent_trainer: "test_loss"}[make]
        tensors, header = load_weights(trainer.run_dir.path / BEST_WEIGHTS)
        assert all(torch.equal(value, averages[header["step"]][key]) for key, value in tensors.items())
        logged = [line[name] for line in metrics(trainer) if name in line]
        return header["step"], header[name], logged, trainer.best

    assert run(3)[:2] == (2, 3.0)
    assert run(6) == (4, 1.0, [3.0, 1.0, 2.0], {"loss": 1.0, "step": 4})
    assert run(9) == (4, 1.0, [3.0, 1.0, 2.0, None], {"loss": 1.0, "step": 4})
    assert run(12 - 1)[:2] == (10, 0.5)


def test_held_out_draws_do_not_follow_the_batch_size(tmp_path):
    small, large = (latent_trainer(tmp_path / str(n), {"train.batch_size": n}) for n in (2, 16))
    found = [trainer.stage.held_out_loss({"latent_model": small.stage.model.eval()}) for trainer in (small, large)]
    assert found[0] == found[1]
    assert small.precision is CPU
