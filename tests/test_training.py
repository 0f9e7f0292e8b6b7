"""The training loop: exact resume, checkpoints that survive anything, EMA weights, clipping, precision."""

import copy
import json
import logging
import os
import signal

import pytest
import torch
from torch import nn

import micro
from data.datasets import open_dataset
from data.latents import LatentSet
from data.splits import place
from infty_diff.model import InftyDiff
from runtime.checkpoint import checkpoint_steps, load_newest_checkpoint, save_checkpoint
from runtime.precision import Precision, pick_device
from runtime.processes import ALONE
from runtime.run_dir import RunDir
from runtime.weights import load_weights, save_weights
from training.ema import Ema
from training.image_stage import ImageStage
from training.latent_stage import LatentStage
from training.trainer import Trainer

CPU = Precision(torch.device("cpu"), None)


def image_trainer(root, changes=None, processes=ALONE, precision=CPU) -> Trainer:
    config = micro.image(root, changes)
    torch.manual_seed(config.run.seed)
    train_set = open_dataset(config.data, "train")
    val_set = open_dataset(config.data, "val") if config.data.val_ratio else None
    stage = ImageStage(config, train_set, val_set, precision, processes)
    return Trainer(config, stage, RunDir(config, resume=True), precision, processes)


def latent_trainer(root, changes=None, processes=ALONE, logvar=None) -> Trainer:
    image = micro.image(root)
    torch.manual_seed(5)
    stage = ImageStage(image, open_dataset(image.data, "train"), open_dataset(image.data, "val"), CPU)
    decoder = InftyDiff(image, stage.modules["encoder"], stage.modules["denoiser"])
    config = micro.latent(root, changes)
    latents = LatentSet.create(torch.randn(20, 2, 6, generator=torch.Generator().manual_seed(1)), logvar)
    torch.manual_seed(config.run.seed)
    stage = LatentStage(config, latents, decoder, CPU, processes)
    return Trainer(config, stage, RunDir(config, resume=True), CPU, processes)


def metrics(trainer: Trainer) -> list[dict]:
    lines = [json.loads(line) for line in (trainer.run_dir.path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All tensors of the newest checkpoint, by path."""
    flat = {}

    def walk(prefix, value):
        if isinstance(value, torch.Tensor):
            flat[prefix] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}/{key}", item)
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                walk(f"{prefix}/{key}", item)

    state = load_newest_checkpoint(trainer.run_dir.checkpoints)
    walk("", {key: value for key, value in state.items() if key != "config"})
    return flat


@pytest.mark.parametrize(("make", "changes"), [
    (image_trainer, {}),
    (image_trainer, {"diffusion.schedule_sampler": "loss-second-moment", "diffusion.steps": 2,
                     "train.plot_sampling_steps": "2", "model.stochastic_encoding": True, "model.learn_sigma": True}),
    (image_trainer, {"mc_integral.type": "sobol", "diffusion.multiscale_loss": True, "train.plot_graph_steps": 4,
                     "train.accumulate": 2}),
    (latent_trainer, {"model.dropout": 0.2, "model.learn_sigma": True, "diffusion.schedule_sampler": "log-normal"}),
], ids=["image", "image-learned-lossaware-stochastic", "image-multiscale-sobol", "latent"])  # fmt: skip
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, make, changes):
    """n + n steps give bit for bit what 2n steps give: weights, EMA weights, optimiser, metrics."""
    whole = make(tmp_path / "whole", changes)
    whole.run()
    make(tmp_path / "parts", {**changes, "train.steps": 3}).run()
    second = make(tmp_path / "parts", changes)
    second.run()
    expected, found = everything(whole), everything(second)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert metrics(whole) == metrics(second)
    one, _ = load_weights(whole.run_dir.path / "weights.safetensors")
    two, _ = load_weights(second.run_dir.path / "weights.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_run_folder_holds_what_the_contract_says(tmp_path):
    trainer = image_trainer(tmp_path)
    trainer.run()
    path = trainer.run_dir.path
    assert json.loads((path / "config.json").read_text())["model"]["nf"] == 8
    lines = metrics(trainer)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"step", "images", "loss", "grad_norm", "learning_rate"} <= lines[0].keys()
    assert lines[-1]["images"] == 24
    assert (path / "images" / "step_00000006.png").stat().st_size > 0
    assert checkpoint_steps(trainer.run_dir.checkpoints) == [6, 3]
    _, header = load_weights(path / "weights.safetensors")
    assert header["config"]["model"]["nf"] == 8 and header["step"] == 6 and header["spectrum"]["decay"] > 0


def test_training_beats_the_trivial_predictor(tmp_path):
    """Predicting zero has the loss E|T ξ|², the mean square of the mollifier's gains."""
    once = {name: 150 for name in ("train.steps", "train.plot_samples_steps", "train.checkpoint_steps")}
    trainer = image_trainer(tmp_path, {**once, "train.plot_graph_steps": 30, "optimizer.learning_rate": 4e-3})
    trainer.run()
    trivial = trainer.stage.process.mollifier.gain((16, 12)).square().mean().item()
    assert metrics(trainer)[-1]["loss"] < 0.7 * trivial


def test_another_configuration_does_not_continue_a_run(tmp_path):
    image_trainer(tmp_path, {"train.steps": 1}).run()
    with pytest.raises(ValueError, match=r"model.nf is 8 there, 16 here"):
        RunDir(micro.image(tmp_path, {"model.nf": 16}), resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        RunDir(micro.image(tmp_path), resume=False)
    RunDir(micro.image(tmp_path, {"train.steps": 100}), resume=True)


def test_metrics_of_a_killed_process_are_repaired(tmp_path):
    config = micro.image(tmp_path)
    run_dir = RunDir(config, resume=True)
    run_dir.path.mkdir(parents=True)
    (run_dir.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    run_dir.start(2)
    run_dir.log({"step": 3, "loss": 1.0})
    run_dir.close()
    lines = (run_dir.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_signal_during_previews_does_not_wait_for_them(tmp_path):
    trainer = image_trainer(tmp_path, {"train.plot_samples_steps": 2})
    drawn = []

    def endless(ema):
        drawn.append(trainer.step)
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass

    trainer.stage.previews = endless
    with pytest.raises(SystemExit):
        trainer.run()
    assert drawn == [2] and checkpoint_steps(trainer.run_dir.checkpoints) == [2]


def state(step: int) -> dict:
    return {"step": step, "modules": {"a": torch.arange(5000.0) + step}, "text": "x", "none": None, "list": [1, 2.0]}


def test_checkpoint_cut_at_any_byte_is_passed_over(tmp_path, caplog):
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    newest = save_checkpoint(tmp_path, 2, state(2), keep=2)
    whole = newest.read_bytes()
    cuts = sorted({*range(0, 200, 7), *range(0, len(whole), len(whole) // 97), *range(len(whole) - 150, len(whole))})
    for cut in cuts:
        newest.write_bytes(whole[:cut])
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert load_newest_checkpoint(tmp_path)["step"] == 1, cut
        assert "step_00000002.pt is damaged" in caplog.text
    newest.write_bytes(whole)
    assert load_newest_checkpoint(tmp_path)["step"] == 2


def test_no_checkpoint_and_rotation(tmp_path):
    assert load_newest_checkpoint(tmp_path / "none") is None
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert checkpoint_steps(tmp_path) == [4, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003.pt", "step_00000004.pt"]


def test_a_checkpoint_cannot_execute_code(tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"step": 9, "x": Evil()}, tmp_path / "step_00000009.pt")
    with pytest.raises(ValueError, match=r"none of its 1 checkpoints loads \(.*step_00000009.pt asks for"):
        load_newest_checkpoint(tmp_path)
    assert not (tmp_path / "executed").exists() and (tmp_path / "step_00000009.pt").exists()


def test_weights_file_faults_are_one_line(tmp_path):
    path = tmp_path / "weights.safetensors"
    with pytest.raises(ValueError, match="no such file"):
        load_weights(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(path)
    save_weights(path, {"a": torch.ones(3)}, {"step": 1})
    tensors, header = load_weights(path)
    assert torch.equal(tensors["a"], torch.ones(3)) and header == {"step": 1}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(path)


def test_ema_starts_from_a_copy_and_follows_the_formula():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = Ema({"m": module}, decay=0.5)
    start = copy.deepcopy(module[0].weight.data)
    assert torch.equal(ema.modules["m"][0].weight, start) and not ema.modules["m"].training
    expected = start.clone()
    for n in range(6):
        module[0].weight.data += 1.0
        module[1].running_mean += 1.0
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module[0].weight.data
    assert torch.allclose(ema.modules["m"][0].weight, expected, atol=1e-6)
    assert torch.equal(ema.modules["m"][1].running_mean, module[1].running_mean)


def test_gradients_are_clipped_per_network(tmp_path):
    trainer = image_trainer(tmp_path, {"train.gradient_clip": 1e-3})
    for module in trainer.stage.modules.values():
        for p in module.parameters():
            p.grad = torch.ones_like(p)
    for module in trainer.stage.modules.values():
        before = trainer._clip(list(module.parameters()))
        count = sum(p.numel() for p in module.parameters())
        assert before.item() == pytest.approx(count**0.5, rel=1e-5)
        after = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        assert after.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_add_up_to_the_gradient_in_half_precision_too(tmp_path, dtype):
    """Up to the rounding of what the parts contribute, with the loss scaled or not."""
    gradients, losses = [], []
    for parts in (1, 4):
        changes = {"train.accumulate": parts, "model.backend": "torch_dense", "train.batch_size": 8}
        trainer = image_trainer(tmp_path, changes, precision=Precision(torch.device("cpu"), dtype))
        assert trainer.scaler.is_enabled() == (dtype is torch.float16)
        scalars = trainer.divided.backward(next(trainer.stage.batches(0)), 0, 0, trainer.scaler)
        trainer.scaler.unscale_(trainer.optimizer)
        gradients.append(torch.cat([p.grad.flatten() for group in trainer.parameters.values() for p in group]))
        losses.append(scalars["loss"].item())
    whole, summed = gradients
    eps = torch.finfo(dtype).eps
    assert losses[1] == pytest.approx(losses[0], rel=4 * eps)
    assert 0 < (summed - whole).norm() < 4 * eps * whole.norm()


def test_skipped_steps_leave_the_weights(tmp_path):
    changes = {"optimizer.gradient_skip": True, "optimizer.gradient_skip_threshold": 0.0, "train.steps": 2}
    trainer = image_trainer(tmp_path, changes)
    before = copy.deepcopy(trainer.stage.modules["denoiser"].state_dict())
    trainer.run()
    after = trainer.stage.modules["denoiser"].state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_precision_choices():
    cpu = torch.device("cpu")
    assert Precision.create(cpu, amp=True).dtype is None
    assert not Precision(cpu, None).scaler().is_enabled()
    assert Precision(torch.device("cuda"), torch.bfloat16).scaler().is_enabled() is False
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device is 'cuda', not among"):
            pick_device("cuda")
        assert pick_device("auto") == cpu


def test_latent_statistics_in_double_precision():
    """Latents with a large offset, which float16 (as the authors used) loses or overflows with."""
    generator = torch.Generator().manual_seed(0)
    mu = 1000 + 0.01 * torch.randn(5000, 2, 3, generator=generator, dtype=torch.float64)
    latents = LatentSet.create(mu.float())
    stored = mu.float().double()
    assert torch.allclose(latents.mean, stored.mean(dim=(0, 1)), rtol=1e-12)
    assert torch.allclose(latents.std, stored.flatten(0, 1).std(dim=0, unbiased=False), rtol=1e-6)
    assert latents.mean.dtype == latents.std.dtype == torch.float64


def test_latents_of_a_stochastic_encoder_are_redrawn():
    mu, logvar = torch.zeros(4, 1, 2), torch.full((4, 1, 2), 2.0).log()
    latents = LatentSet.create(mu, logvar)
    assert torch.allclose(latents.std, torch.full((2,), 2.0).double().sqrt())
    draws = latents.draw(torch.zeros(20000, dtype=torch.int64), torch.randn(20000, 2))
    assert draws.var().item() == pytest.approx(2.0, rel=0.05)


def test_constant_and_broken_latents():
    assert torch.equal(LatentSet.create(torch.ones(3, 1, 2)).std, torch.ones(2).double())
    broken = torch.ones(3, 1, 2)
    broken[1] = torch.nan
    with pytest.raises(ValueError, match="encoding of image 1 is not finite"):
        LatentSet.create(broken)


def test_latents_are_held_out_by_the_names_of_their_images():
    """With its mirror image, on one side; independently of what stage one held out."""
    names = [name for i in range(600) if place(name := f"dress/{i}.jpg", "validation") >= 0.1][:500]
    latents = LatentSet.create(torch.arange(1000.0).view(500, 2, 1), names=names)
    train, test = latents.split(0.1)
    held_out = [i for i, name in enumerate(names) if place(name, "latents") < 0.1]
    assert 25 < len(held_out) < 75 and len(train) + len(test) == 500
    drawn = test.draw(torch.arange(test.count)).flatten().tolist()
    assert drawn == [2 * i + view for i in held_out for view in (0, 1)]
    assert torch.equal(test.mean, latents.mean) and list(test.names) == [names[i] for i in held_out]
    for count in (1, 2, 3):
        parts = LatentSet.create(torch.zeros(count, 1, 1)).split(0.01)
        assert [len(part) for part in parts] == ([1, 0] if count == 1 else [count - 1, 1])
    assert len(latents.split(0.0)[0]) == 500
