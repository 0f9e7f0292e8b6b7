"""What a run keeps on the disk guards itself: whatever happens to its files, nothing good is lost."""

import json
import logging
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import micro
from runtime import checkpoint, weights
from runtime.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from runtime.run_dir import RunDir
from runtime.stored import weights_path
from runtime.weights import load_cache, load_weights, save_weights
from test_training import image_trainer, latent_trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps, with checkpoints of steps 2 and 3."""
    root = tmp_path_factory.mktemp("made")
    image_trainer(root, {"train.steps": 3, "train.checkpoint_steps": 2}).run()
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made / "micro", tmp_path / "micro")
    return tmp_path


def content(root) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def state(step: int) -> dict:
    return {"step": step, "modules": {"a": torch.arange(2000.0) + step}, "text": "x", "none": None, "list": [1, 2.0]}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path, chance = save_checkpoint(tmp_path, 1, state(1), keep=1), random.Random(0)
    whole = path.read_bytes()
    last = range(8 * (len(whole) - 120), 8 * len(whole), 5)
    for bit in [*(chance.randrange(8 * len(whole)) for _ in range(300)), *range(0, 800, 7), *last]:
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match=r"step_00000001\.pt"):
            load_checkpoint(tmp_path, 1)
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(tmp_path, 1)["modules"]["a"], state(1)["modules"]["a"])

    weights = tmp_path / "weights.safetensors"
    save_weights(weights, {"a": torch.arange(300.0), "b": torch.ones(3).half()}, {"step": 1, "config": {}})
    whole = weights.read_bytes()
    for bit in range(8 * len(whole)):
        if bit > 8 * 600 and bit % 7:
            continue
        weights.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            load_weights(weights)
    weights.write_bytes(whole)
    assert load_weights(weights)[1] == {"step": 1, "config": {}}


def test_where_no_checkpoint_loads_nothing_is_touched(root):
    for path in (root / "micro" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-900])
    before = content(root)
    with pytest.raises(ValueError, match=r"checkpoints: none of its 2 checkpoints loads \(.*step_00000003.pt"):
        image_trainer(root).run()
    assert content(root) == before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError(), PermissionError(13, "denied"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])  # fmt: skip
def test_what_cannot_be_read_is_not_taken_for_damaged(root, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    before = content(root)
    monkeypatch.setattr(checkpoint.torch, "load", fail)
    with pytest.raises(OSError, match=r"step_00000003\.pt: cannot be read \(.+\); accepted: the same command"):
        image_trainer(root).run()
    assert content(root) == before


def test_what_a_kill_after_a_checkpoint_left_out_is_made_up(tmp_path):
    changes = {"train.keep_every": 3, "train.plot_samples_steps": 3}
    image_trainer(tmp_path, changes).run()
    run, before = tmp_path / "micro", content(tmp_path)
    shutil.copy(run / "weights" / "step_00000003.safetensors", run / "weights.safetensors")
    (run / "weights" / "step_00000006.safetensors").write_bytes(b"cut")
    (run / "images" / "step_00000006.png").unlink()
    image_trainer(tmp_path, changes).run()
    assert content(tmp_path) == before
    newest = run / "weights.safetensors"
    newest.write_bytes(flipped(newest.read_bytes(), 8 * newest.stat().st_size - 9))
    image_trainer(tmp_path, changes).run()
    assert content(tmp_path) == before


def test_a_folder_that_cannot_be_listed_is_no_new_run(root, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.os, "listdir", fail)
    with pytest.raises(PermissionError, match="checkpoints"):
        RunDir(micro.image(root), resume=True)


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(root, caplog):
    folder = root / "micro" / "checkpoints"
    newest = checkpoint_path(folder, 3)
    newest.write_bytes(newest.read_bytes()[:-5000])
    with caplog.at_level(logging.WARNING):
        image_trainer(root, {"train.steps": 4, "train.checkpoint_steps": 4}).run()
    assert "step_00000003.pt is damaged" in caplog.text
    assert checkpoint_steps(folder) == [4, 2] and newest.with_name("step_00000003.pt.damaged").exists()


def test_nothing_is_set_aside_before_it_is_known_what_to_go_on_from(root):
    folder = root / "micro" / "checkpoints"
    older, newest = checkpoint_path(folder, 2), checkpoint_path(folder, 3)
    whole, held = older.read_bytes(), load_checkpoint(folder, 2)
    shutil.copy(older, newest)
    with pytest.raises(ValueError, match=r"step_00000003\.pt is not of the step in its name: it holds step 2"):
        load_checkpoint(folder, 3)
    CHANGES["another stage"][0](held)
    save_checkpoint(folder, 2, held, keep=2)
    before = content(root)
    with pytest.raises(ValueError, match=r"step_00000002\.pt is a state of LatentConfig"):
        image_trainer(root).run()
    assert content(root) == before
    older.write_bytes(whole)
    image_trainer(root, {"train.steps": 4, "train.checkpoint_steps": 4}).run()
    assert checkpoint_steps(folder) == [4, 2] and newest.with_name("step_00000003.pt.damaged").exists()


def test_an_emptied_configuration_lets_nothing_pass(root):
    (root / "micro" / "config.json").write_text("{}")
    before = content(root)
    with pytest.raises(
        ValueError, match=r"step_00000003\.pt was written with another configuration \(model.kld_weight"
    ):
        image_trainer(root, {"model.kld_weight": 0.5}).run()
    assert content(root) == before
    (root / "micro" / "config.json").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        RunDir(micro.image(root), resume=False)


def changed(root, change) -> None:
    """The newest checkpoint, written anew with a change of its state."""
    folder = root / "micro" / "checkpoints"
    held = load_checkpoint(folder, 3)
    change(held)
    save_checkpoint(folder, 3, held, keep=2)


def first(part: dict) -> str:
    return next(iter(part))


CHANGES = {
    "a missing tensor": (lambda s: s["modules"]["encoder"].pop(first(s["modules"]["encoder"])), "is missing there"),
    "an extra tensor": (lambda s: s["ema"]["modules"]["encoder"].update(more=torch.ones(2)), "encoder.more is .* here"),
    "another shape": (lambda s: s["modules"]["denoiser"].update(
        {first(s["modules"]["denoiser"]): torch.ones(1, 2)}), r"is \[1, 2\] there"),
    "moments of another shape": (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(7)), r"is \[7\]"),
    "no networks": (lambda s: s.update(modules=[]), "not built as a training state"),
    "another version": (lambda s: s.pop("guard"), "of another version, without guard"),
    "no configuration": (lambda s: s.update(config=None), "holds no configuration"),
    "another stage": (lambda s: s.update(config={name: {} for name in (
        "run", "data", "train", "model", "diffusion", "optimizer")}), "is a state of LatentConfig"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_does_not_fit_is_one_line(root, name):
    change, said = CHANGES[name]
    changed(root, change)
    before = content(root)
    with pytest.raises(ValueError, match=said) as error:
        image_trainer(root).run()
    assert "step_00000003.pt" in str(error.value) and "\n" not in str(error.value)
    assert content(root) == before


def test_a_newer_format_is_refused_and_not_passed_over(root, monkeypatch):
    for module in (checkpoint, weights):
        monkeypatch.setattr(module, "FORMAT", 2)
    changed(root, lambda held: None)
    save_weights(root / "weights.safetensors", {"a": torch.ones(2)}, {"step": 1})
    monkeypatch.undo()
    before = content(root)
    with pytest.raises(ValueError, match=r"step_00000003\.pt: is in format 2; accepted: formats up to 1"):
        image_trainer(root).run()
    with pytest.raises(ValueError, match=r"weights\.safetensors: is in format 2; accepted: formats up to 1"):
        load_weights(root / "weights.safetensors")
    assert content(root) == before


def test_files_without_format_load_unchecked(tmp_path):
    torch.save(state(4), tmp_path / "step_00000004.pt")
    assert load_newest_checkpoint(tmp_path)["step"] == 4
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"header": '{"step": 7}'})
    assert load_weights(tmp_path / "old.safetensors")[1] == {"step": 7}


def test_what_is_not_finite_is_refused(tmp_path):
    torch.save({"step": 4, "x": torch.tensor([1.0, torch.nan])}, tmp_path / "step_00000004.pt")
    with pytest.raises(ValueError, match=r"step_00000004\.pt is of no use: x is not finite"):
        load_newest_checkpoint(tmp_path)
    save_file({"a": torch.tensor([torch.inf])}, tmp_path / "w.safetensors", metadata={"header": "{}"})
    with pytest.raises(ValueError, match=r"w\.safetensors: is of no use: a is not finite"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("header", ["[]", "null", "3", '"x"', "{", "[" * 100_000])
def test_headers_of_another_kind(tmp_path, header):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors", metadata={"header": header})
    with pytest.raises(ValueError, match=r"w\.safetensors: its header is no object of JSON"):
        load_weights(tmp_path / "w.safetensors")


def test_a_damaged_cache_is_computed_anew(tmp_path, caplog):
    path, key = tmp_path / "cache.safetensors", {"data": "x"}
    assert load_cache(path, key, {"a": (50,)}) is None and not caplog.text
    save_weights(path, {"a": torch.arange(50.0)}, key)
    assert torch.equal(load_cache(path, key, {"a": (None,)})["a"], torch.arange(50.0))
    assert load_cache(path, {"data": "y"}, {"a": (50,)}) is None
    for shapes in ({}, {"a": (49,)}, {"a": (50, 1)}, {"a": (50,), "b": (1,)}):
        assert load_cache(path, key, shapes) is None
    whole = path.read_bytes()
    for damaged in (whole[:-9], flipped(whole, 8 * len(whole) - 11), b"", b"\xff" * 50):
        caplog.clear()
        path.write_bytes(damaged)
        assert load_cache(path, key, {"a": (50,)}) is None
        assert "cache.safetensors" in caplog.text and "; computed anew" in caplog.text


def test_run_files_of_another_kind_are_no_traceback(root):
    run = root / "micro"
    (run / "history.jsonl").write_bytes(b"\xff\xfe[]\n")
    good = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(
        b"null\n[]\n\xff\xfe\n" + b"[" * 100_000 + b'\n{"step": "x"}\n' + good + b'{"ste'
    )
    image_trainer(root, {"train.steps": 4}).run()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert (run / "history.jsonl").read_bytes().startswith(b"\xff\xfe[]\n")
    for text in (b"", b"[]", b"null", b"\xff\xfe", b"{", b"[" * 100_000):
        (run / "config.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"config\.json: holds .+; accepted: the configuration of a run"):
            RunDir(micro.image(root), resume=True)


@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
def test_scaling_of_losses_goes_on_where_both_sides_have_it(tmp_path, make):
    """A run without loss scaling goes on with it, and the other way round."""

    def scaler():
        return torch.amp.GradScaler("cpu", enabled=True, init_scale=512.0)

    make(tmp_path, {"train.steps": 1}).run()
    scaled = make(tmp_path, {"train.steps": 2})
    scaled.scaler = scaler()
    scaled.run()
    again = make(tmp_path, {"train.steps": 3})
    again.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0)
    again._resume()
    assert again.scaler.get_scale() == 512.0
    plain = make(tmp_path, {"train.steps": 3})
    plain.run()
    assert plain.step == 3


def test_other_data_are_told_with_both_counts(root, caplog):
    trainer = image_trainer(root, {"train.steps": 4})
    trainer.stage.fingerprint, trainer.stage.examples = "another", {"images": 1900, "held out": 2}
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "the data have changed since" in caplog.text
    assert "24 images, 2 held out there, 1,900 images, 2 held out here" in caplog.text
    caplog.clear()
    trainer = image_trainer(root, {"train.steps": 5})
    trainer.stage.fingerprint = "another"
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "the data have changed" not in caplog.text


def test_states_that_tell_data_by_dates_warn_of_other_counts_alone(root, caplog):
    path = root / "micro/checkpoints/step_00000003.pt"
    state = torch.load(path, weights_only=True)
    state["data"] = {"fingerprint": "by dates", "examples": state["data"]["examples"]}
    torch.save(state, path)
    trainer = image_trainer(root, {"train.steps": 4})
    trainer.run()
    assert trainer.step == 4 and "the data have changed" not in caplog.text


def test_fewer_steps_than_were_taken_change_nothing(root, caplog):
    before = content(root)
    with caplog.at_level(logging.INFO):
        image_trainer(root, {"train.steps": 2}).run("next")
    assert "micro is at step 3, past train.steps=2: nothing is changed" in caplog.text and "next" not in caplog.text
    assert content(root) == before


def test_numbered_checkpoints_and_weights_stay(tmp_path):
    changes = {"train.keep_every": 4, "train.keep_checkpoints": 1, "train.steps": 10, "train.checkpoint_steps": 3}
    trainer = image_trainer(tmp_path, changes)
    trainer.run()
    assert checkpoint_steps(trainer.run_dir.checkpoints) == [10, 8, 4]
    with pytest.raises(ValueError, match=r"step_00000005\.safetensors: no such file; accepted: the steps kept, 4, 8"):
        weights_path(tmp_path / "micro", "5")
    for step in (4, 8):
        kept = load_checkpoint(trainer.run_dir.checkpoints, step)["ema"]["modules"]["encoder"]
        tensors = load_file(weights_path(tmp_path / "micro", str(step)))
        assert all(torch.equal(tensors[f"encoder.{name}"], value) for name, value in kept.items())
    shutil.copy(weights_path(tmp_path / "micro"), weights_path(tmp_path / "micro", "4"))
    with pytest.raises(ValueError, match=r"step_00000004\.safetensors: holds weights of step 10; accepted: those of"):
        weights_path(tmp_path / "micro", "4")
