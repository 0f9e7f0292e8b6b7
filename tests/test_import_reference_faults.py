"""Wrong files and wrong commands of the import: one readable line each, and nothing written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import micro
from infty_diff.reference_runs import read_image_run, read_latent_run, write_runs
from models.factory import build_latent_model
from reference_files import COMMAND, SQUARE, checkpoint, image_arguments, latent_arguments, named, write_theirs
from test_commands import fails


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    return write_theirs(tmp_path_factory.mktemp("theirs"))


class Code:
    """What a hostile file asks for when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def without(key: str) -> Callable[[dict], dict]:
    return lambda held: {name: value for name, value in held.items() if name != key}


def within(key: str, **changes: object) -> Callable[[dict], dict]:
    """Change tensors of one of the states: None takes one away."""
    named_so = {name.replace("__", "."): value for name, value in changes.items()}
    return lambda held: {
        **held, key: {name: v for name, v in {**held[key], **named_so}.items() if v is not None}
    }  # fmt: skip


ENCODER, AVERAGED = "encoder_state_dict", "model_ema_state_dict"
IMAGE_FAULTS = {
    "no dictionary": (lambda held: [1, 2], {}, "holds a list; accepted: a checkpoint with encoder_state_dict, glob"),
    "of the other stage": (without(ENCODER), {}, "holds the keys global_step, model_state_dict, model_ema"),
    "unknown keys": (lambda held: {**held, "scheduler": {}}, {}, "holds scheduler too, of unknown meaning"),
    "no step": (lambda held: {**held, "global_step": "many"}, {}, "global_step is 'many'; accepted: a number"),
    "no state": (lambda held: {**held, ENCODER: [torch.zeros(1)]}, {}, f"{ENCODER} is no state of a network"),
    "no tensors": (within(ENCODER, mu="text"), {}, f"{ENCODER} is no state of a network"),
    "sparse tensors": (within(ENCODER, mu=torch.eye(2).to_sparse()), {}, f"{ENCODER} is no state of a network"),
    "no tensors at all": (lambda held: {**held, AVERAGED: {}}, {}, "no sparse blocks as torchsparse or torch_dense"),
    "a tensor too many": (
        within(ENCODER, head__weight=torch.zeros(1)),
        {},
        "no place for: head.weight; accepted: the ",
    ),
    "a tensor too few": (
        within(AVERAGED, linear_in__bias=None),
        {},
        f"{AVERAGED}: the reference state lacks 'linear_in",
    ),
    "transposed": (within(AVERAGED, linear_in__weight=torch.zeros(3, 8)), {}, "'linear_in.weight' has shape (3, 8)"),
    "not finite": (within(ENCODER, linear_in__bias=torch.full((8,), torch.nan)), {}, "linear_in.bias is not finite"),
    "other width": (dict, {"model.nf": 16}, "'linear_in.weight' has shape (8, 3); 'linear_in.weight' needs (16, 3)"),
    "other kernel": (dict, {"model.kernel_size": 5}, "'down_blocks.0.block.conv.kernel' has shape (9, 1, 8)"),
    "fewer levels": (
        dict,
        {"model.uno_mults": (1,), "model.uno_blocks_per_level": (1,), "model.uno_attn_resolutions": ()},
        f"{AVERAGED}: 'uno.mid_block1.in_layers.0.weight' has shape (1, 16, 1, 1)",
    ),
    "fewer blocks": (dict, {"model.num_conv_blocks": 2}, "lacks 'down_blocks.1.block."),
    "other grid": (
        dict,
        {"model.uno_res": 16, "model.uno_attn_resolutions": (8,)},
        "has shape (1, 64, 2); model.uno_res=16 needs (1, 256, 2)",
    ),
    "stochastic": (dict, {"model.stochastic_encoding": True}, f"{ENCODER}: the reference state lacks 'mu.weight'"),
    "not square": (dict, {"data.img_width": 12}, "data.img_width=12: accepted: 16"),
    "spectral": (dict, {"model.uno_conv_type": "spectral"}, "model.uno_conv_type='spectral': accepted: 'conv'"),
    "back end": (dict, {"model.backend": "none"}, "model.backend is 'none'"),
}


@pytest.mark.parametrize(("change", "fields", "message"), IMAGE_FAULTS.values(), ids=IMAGE_FAULTS)
def test_autoencoders_that_are_refused(theirs, tmp_path, change, fields, message):
    held = torch.load(theirs / "image" / "checkpoint.pkl", weights_only=True)
    torch.save(change(held), tmp_path / "checkpoint.pkl")
    with pytest.raises(ValueError) as caught:
        read_image_run(tmp_path, micro.image(tmp_path, {**SQUARE, **fields}))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


LATENTS = (torch.zeros(3, 6), torch.zeros(2, 6), torch.zeros(1, 6), torch.ones(1, 6))
LATENT_FAULTS = {
    "no latents": ([1, 2], {}, "latents.pkl holds no latents; accepted: the latents.pkl of"),
    "three tensors": (LATENTS[:3], {}, "holds no latents"),
    "vectors": ((*LATENTS[:3], torch.ones(6)), {}, "holds no latents"),
    "widths": ((*LATENTS[:3], torch.ones(1, 5)), {}, "latents of size 6, a mean of shape (1, 6) and a deviation of"),
    "zero": ((*LATENTS[:3], torch.zeros(1, 6)), {}, "deviations of latents are zero or not finite"),
    "not a number": ((*LATENTS[:2], torch.full((1, 6), torch.nan), LATENTS[3]), {}, "zero or not finite"),
    "other size": (tuple(part[:, :5] for part in LATENTS), {}, "'time_embed.0.weight' has shape (6, 8); 'time_mlp.0."),
    "other layers": (LATENTS, {"model.num_layers": 4}, "lacks 'layers.1.linear.weight'"),
    "variance": (LATENTS, {"model.learn_sigma": True}, "model.learn_sigma=True: accepted: False"),
}


@pytest.mark.parametrize(("latents", "fields", "message"), LATENT_FAULTS.values(), ids=LATENT_FAULTS)
def test_latent_models_that_are_refused(theirs, tmp_path, latents, fields, message):
    shutil.copy(theirs / "latent" / "latent_checkpoint.pkl", tmp_path)
    torch.save(latents, tmp_path / "latents.pkl")
    with pytest.raises(ValueError) as caught:
        read_latent_run(tmp_path, None, micro.latent(tmp_path, fields))
    assert message in str(caught.value)


def damaged(kind: str, good: Path, path: Path) -> None:
    """Write a file that is no checkpoint."""
    if kind == "code":
        torch.save({"global_step": Code()}, path)
    elif kind == "old code":
        torch.save({"global_step": Code()}, path, _use_new_zipfile_serialization=False)
    else:
        contents = {"empty": b"", "text": b"<html>no such page</html>", "cut": good.read_bytes()[:-400],
                    "noise": np.random.default_rng(0).bytes(999)}  # fmt: skip
        path.write_bytes(contents[kind])


@pytest.mark.parametrize("kind", ["code", "old code", "empty", "text", "cut", "noise"])
def test_files_that_are_no_checkpoints(theirs, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    damaged(kind, theirs / "image" / "checkpoint.pkl", tmp_path / "checkpoint.pkl")
    message = "system; accepted: tensors" if "code" in kind else "is damaged, or no file of PyTorch"
    with pytest.raises(ValueError, match=message):
        read_image_run(tmp_path / "checkpoint.pkl", micro.image(tmp_path, SQUARE))
    assert not (tmp_path / "executed").exists()


def test_an_error_while_writing_leaves_nothing(theirs, tmp_path, monkeypatch):
    runs = [read_image_run(theirs / "image", micro.image(tmp_path, SQUARE)),
            read_latent_run(theirs / "latent", None, micro.latent(tmp_path))]  # fmt: skip
    with pytest.raises(ValueError, match="both runs would be kept there"):
        write_runs([runs[0], runs[0]])
    written = []

    def full(path: Path, content: dict) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("infty_diff.reference_runs.write_json", full)
    with pytest.raises(OSError, match="No space"):
        write_runs(runs)
    assert len(written) == 2 and not list(tmp_path.iterdir())


def test_wrong_commands_end_in_one_line_and_write_nothing(theirs, tmp_path):
    there = tmp_path / "runs"
    image, latent = image_arguments(there, theirs / "image"), latent_arguments(there, theirs / "latent")
    fails([COMMAND], "--checkpoint, --latent_checkpoint; accepted: one of them, or both")
    fails([COMMAND, *image[:-1]], "--config, --checkpoint; accepted: both, or neither")
    fails([COMMAND, *image_arguments(there, tmp_path / "none.pkl")], "none.pkl: no such file")
    fails([COMMAND, *image, "--config.model.coordinate_convention=cell_centred"], "accepted: reference, for this")
    # One stage that is right does not save the other.
    fails([COMMAND, *image, *latent_arguments(there, theirs / "latent", {"model.hid_channels": 8})], "'in_layer.")
    small = build_latent_model(micro.latent(there).model, 5)
    torch.save(checkpoint(500, {}, named(small)), tmp_path / "latent_checkpoint.pkl")
    torch.save(tuple(part[:, :5] for part in LATENTS), tmp_path / "latents.pkl")
    fails([COMMAND, *image, *latent_arguments(there, tmp_path)], "draws latents of size 5; accepted: 6, as --c")
    assert not there.exists()
    (there / "image").mkdir(parents=True)
    (there / "image" / "config.json").write_text("{}")
    fails([COMMAND, *image, *latent], "runs/image exists; accepted: another run.experiment or run.root_dir")
    assert [path.name for path in there.rglob("*")] == ["image", "config.json"]
