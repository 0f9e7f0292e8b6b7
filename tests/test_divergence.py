"""Gradients and states that are not finite: never applied, never written, and a run that can go on."""

import copy
import json
import signal

import pytest
import torch

from configs.schema import OptimizerConfig
from runtime.checkpoint import checkpoint_steps, load_checkpoint, require_finite, save_checkpoint
from runtime.command import readable_errors
from runtime.precision import Precision
from runtime.processes import ALONE
from runtime.weights import load_weights, save_weights
from test_training import everything, image_trainer, latent_trainer, metrics
from training.guard import StepGuard
from training.means import Means

CPU = torch.device("cpu")


def strict(text: str):
    """JSON as the standard has it, without the NaN and Infinity that Python reads too."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def spoil(trainer, bad_steps) -> None:
    """Let the gradient of these steps, of the first part alone, be NaN while the loss is finite: √x at 0."""
    plain, bad_steps = trainer.stage.loss, set(bad_steps)

    def loss(batch, draws):
        value, *rest = plain(batch, draws)
        if trainer.step in bad_steps:
            bad_steps.remove(trainer.step)
            value = value + (next(iter(trainer.stage.modules.values())).parameters().__next__().sum() * 0).sqrt()
            assert value.isfinite()
        return value, *rest

    trainer.stage.loss = loss


@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
@pytest.mark.parametrize("skip_large", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, make, skip_large):
    trainer = make(tmp_path, {"optimizer.gradient_skip": skip_large, "optimizer.weight_decay": 0.1,
                              "train.accumulate": 1 + skip_large})  # fmt: skip
    spoil(trainer, {2})
    batches = trainer.stage.batches(0)
    for step in range(4):
        before = copy.deepcopy([m.state_dict() for m in trainer.stage.modules.values()])
        moments = copy.deepcopy(trainer.optimizer.state_dict()["state"])
        trainer.train_step(next(batches))
        after = [m.state_dict() for m in trainer.stage.modules.values()]
        same = all(torch.equal(a[k], b[k]) for a, b in zip(before, after) for k in a)
        assert same == (step == 2)
        now = trainer.optimizer.state_dict()["state"]
        assert all(value["step"].item() == (step + 1 if step < 2 else step) for value in now.values())
        if step == 2:
            assert all(torch.equal(value[key], now[i][key]) for i, value in moments.items() for key in value)
    assert trainer.guard.read() == (1, 0) and trainer.means.read()["grad_norm"] > 0
    require_finite([m.state_dict() for m in trainer.stage.modules.values()])


def test_a_bad_step_is_counted_in_the_log_and_the_run_ends_well(tmp_path):
    changes = {"train.plot_graph_steps": 2}
    trainer = image_trainer(tmp_path, changes)
    spoil(trainer, {2, 3, 5})
    trainer.run()
    lines = [strict(line) for line in (trainer.run_dir.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 2, 1]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None and lines[2]["loss"] > 0
    require_finite(load_checkpoint(trainer.run_dir.checkpoints, 6))


def test_counts_survive_a_stop(tmp_path):
    changes = {"train.plot_graph_steps": 5, "train.checkpoint_steps": 3}
    whole, first, second = (image_trainer(tmp_path / name, {**changes, "train.steps": n})
                            for name, n in (("a", 6), ("b", 3), ("b", 6)))  # fmt: skip
    for trainer in (whole, first, second):
        spoil(trainer, {1, 2, 3})
        trainer.run()
    assert [line["skipped_steps"] for line in metrics(whole)] == [3] and metrics(whole) == metrics(second)
    one, other = everything(whole), everything(second)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_too_many_in_a_row_stop_the_run_which_goes_on_as_the_message_says(tmp_path, capsys):
    trainer = image_trainer(tmp_path, {"optimizer.max_nonfinite_steps": 3})
    spoil(trainer, {1, 3, 4, 5})
    with pytest.raises(SystemExit) as left, readable_errors():
        trainer.run()
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "in 3 steps in a row" in line and "at step 6; the checkpoint of step 3 is as it was: continue" in line
    assert checkpoint_steps(trainer.run_dir.checkpoints) == [3]
    advised = {"optimizer.learning_rate": 1e-5, "train.amp": False, "optimizer.max_nonfinite_steps": 3}
    again = image_trainer(tmp_path, advised)
    again.run()
    assert metrics(again)[-1]["learning_rate"] == 1e-5 and checkpoint_steps(again.run_dir.checkpoints) == [6, 3]


def test_a_checkpoint_waits_for_the_end_of_a_row(tmp_path):
    """Weights after which no gradient is finite push no good checkpoint out, and are no inference weights."""
    changes = {"train.checkpoint_steps": 2, "train.keep_checkpoints": 1, "train.plot_graph_steps": 12,
               "train.plot_samples_steps": 100, "optimizer.max_nonfinite_steps": 5}  # fmt: skip
    trainer = image_trainer(tmp_path, {**changes, "train.steps": 12})
    spoil(trainer, {3, *range(7, 12)})
    save, saved = trainer._save, []
    trainer._save = lambda: (saved.append(trainer.step), save())
    with pytest.raises(FloatingPointError, match=r"5 steps in a row .*; the checkpoint of step 6 is as it was"):
        trainer.run()
    assert saved == [2, 5, 6] and checkpoint_steps(trainer.run_dir.checkpoints) == [6]


def test_a_signal_within_a_row_saves_what_may_be_dropped_later(tmp_path):
    changes = {"train.checkpoint_steps": 2, "train.keep_checkpoints": 1, "train.plot_graph_steps": 1,
               "train.steps": 20, "optimizer.max_nonfinite_steps": 4}  # fmt: skip
    first = image_trainer(tmp_path, changes)
    spoil(first, range(3, 20))
    step = first.train_step

    def signalled(batch):
        step(batch)
        first.signals.number = signal.SIGTERM if first.step == 5 else 0

    first.train_step = signalled
    with pytest.raises(SystemExit):
        first.run()
    _, header = load_weights(tmp_path / "micro" / "weights.safetensors")
    assert checkpoint_steps(first.run_dir.checkpoints) == [5, 2] and header["step"] == 2
    second = image_trainer(tmp_path, changes)
    spoil(second, range(3, 20))
    with pytest.raises(FloatingPointError, match=r"4 steps in a row .*; the checkpoint of step 2 is as it was"):
        second.run()
    assert checkpoint_steps(second.run_dir.checkpoints) == [2]


def test_the_last_step_is_no_exception(tmp_path):
    trainer = image_trainer(tmp_path, {"optimizer.max_nonfinite_steps": 2, "train.checkpoint_steps": 100,
                                       "train.plot_graph_steps": 100})  # fmt: skip
    spoil(trainer, {4, 5})
    with pytest.raises(FloatingPointError, match=r"there is no checkpoint: begin with a smaller optimizer\.learning"):
        trainer.run()
    assert not (trainer.run_dir.path / "weights.safetensors").exists()


@pytest.mark.parametrize("part", ["modules", "ema", "optimizer"])
def test_a_state_that_is_not_finite_is_not_written(tmp_path, part):
    image_trainer(tmp_path, {"train.steps": 3}).run()
    weights = tmp_path / "micro" / "weights.safetensors"
    kept = weights.read_bytes()
    trainer = image_trainer(tmp_path)
    update = trainer.ema.update

    def break_one_value():
        update()
        if trainer.step == 6:
            broken = {
                "modules": next(trainer.stage.modules["encoder"].parameters()),
                "ema": next(trainer.ema.modules["denoiser"].parameters()),
                "optimizer": next(iter(trainer.optimizer.state.values()))["exp_avg_sq"],
            }
            broken[part].data.view(-1)[-1] = torch.inf

    trainer.ema.update = break_one_value
    with pytest.raises(FloatingPointError, match=rf"{part}\..* is not finite at step 6; the checkpoint of step 3 is"):
        trainer.run()
    assert checkpoint_steps(trainer.run_dir.checkpoints) == [3] and weights.read_bytes() == kept
    assert [path.suffix for path in trainer.run_dir.checkpoints.iterdir()] == [".pt"]
    image_trainer(tmp_path, {"optimizer.learning_rate": 1e-4}).run()
    assert checkpoint_steps(trainer.run_dir.checkpoints) == [6, 3]


def test_nothing_not_finite_can_be_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"b\.1\.c is not finite"):
        save_checkpoint(tmp_path, 1, {"a": torch.ones(2), "b": [1, {"c": torch.tensor([1.0, torch.nan])}]}, keep=1)
    with pytest.raises(FloatingPointError, match="x is not finite"):
        save_weights(tmp_path / "weights.safetensors", {"x": torch.tensor([-torch.inf]).half()}, {})
    assert list(tmp_path.iterdir()) == []
    require_finite({"whole": torch.tensor([1 << 62]), "text": "nan", "empty": torch.empty(0)})


def test_loss_scaling_skips_too(tmp_path):
    """In half precision the first scales overflow: the scale falls, nothing else changes."""
    changes = {"model.backend": "torch_dense", "train.accumulate": 2}
    trainer = image_trainer(tmp_path, changes, precision=Precision(CPU, torch.float16))
    assert trainer.scaler.is_enabled()
    trainer.divided.precision = Precision(CPU, None)  # the networks compute in full precision: this is about the scale
    spoil(trainer, {1})
    batches, scales = trainer.stage.batches(0), []
    for _ in range(3):
        before = copy.deepcopy(trainer.stage.modules["encoder"].state_dict())
        trainer.train_step(next(batches))
        after = trainer.stage.modules["encoder"].state_dict()
        scales.append((trainer.scaler.get_scale(), all(torch.equal(before[k], after[k]) for k in before)))
    assert scales == [(65536.0, False), (32768.0, True), (32768.0, False)]


def test_guard_counts_on_its_own():
    guard = StepGuard(OptimizerConfig(gradient_skip=True, gradient_skip_threshold=10.0), CPU)
    norms = [1.0, 10.0, torch.nan, torch.inf, 3.0, 11.0, torch.nan, -torch.inf, torch.inf]
    skipped = [bool(guard.skips(torch.tensor(norm))) for norm in norms]
    assert skipped == [False, True, True, True, False, True, True, True, True] and guard.read() == (7, 3)
    guard.clear()
    guard.skips(torch.tensor(torch.nan))
    assert guard.read() == (1, 4)  # the row goes on
    other = StepGuard(OptimizerConfig(), CPU)
    other.load_state_dict(guard.state_dict())
    assert not other.skips(torch.tensor(1e30)) and other.read() == (1, 0)


def test_means_leave_out_what_does_not_count():
    means = Means(ALONE)
    assert means.read() == {}
    for value, taken in ((1.0, True), (torch.nan, True), (5.0, False), (3.0, True)):
        means.add({"a": torch.tensor(value), "b": torch.tensor(2.0).half()}, torch.tensor(taken))
    assert means.read() == {"a": 2.0, "b": 2.0}
    means.clear()
    means.add({"a": torch.tensor(1.0)}, torch.tensor(False))
    assert means.read()["a"] != means.read()["a"]
