"""Checkpoints of the authors' code as runs of ours: which of their tensors, and under which configuration."""

from __future__ import annotations

import dataclasses
import glob
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.schema import ImageConfig, LatentConfig
from infty_diff.latent_prior import LatentPrior
from models.factory import build_denoiser, build_encoder, build_latent_model
from models.operators.dispatch import get_backend
from models.reference_weights import LAYOUTS, layout_of_state, state_from_reference
from runtime.checkpoint import load_plain
from runtime.files import file_digest, plain, sweep, temporary_of, write_json
from runtime.run_dir import run_path
from runtime.stored import WEIGHTS
from runtime.weights import save_weights

IMAGE_FILE, LATENT_FILE, LATENTS_FILE = "checkpoint.pkl", "latent_checkpoint.pkl", "latents.pkl"
CHOICES = ("auto", "averaged", "last")

_LAST, _AVERAGED, _ENCODER = "model_state_dict", "model_ema_state_dict", "encoder_state_dict"
_STEP, _OPTIMISER = "global_step", "optimizer_state_dict"
# Above this fraction of it, the image model's average is worse than the weights it averages.
_LARGEST_START = 1e-3
# What their code computes, where ours has more to choose from.
_FIXED = {"downsampling": "grid", "kernel": "linear", "uno_conv_type": "conv", "learn_sigma": False}


@dataclasses.dataclass(frozen=True)
class ReferenceRun:
    """What a run folder is made of.

    config: as stored in it. tensors: of the inference file. step: of their training. files: names and digests of what
    was read. notes: one line each about what was taken and what was not there.
    """

    config: ImageConfig | LatentConfig
    tensors: dict[str, torch.Tensor]
    step: int
    files: dict[str, str]
    notes: list[str]

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return run_path(self.config)


def read_image_run(path: Path, config: ImageConfig, weights: str = "auto") -> ReferenceRun:
    """The authors' diffusion autoencoder.

    Their average of the denoiser starts from another random network, of which ema_decay^(step / ema_update_every)
    remains. They average no encoder: the one of the last step is what their latent model was trained on.

    Args:
        path: `checkpoint.pkl`, or the folder that holds it.
        config: the model. Its coordinates and the norms of its encoder are set to those of the checkpoint.
        weights: of the denoiser: "averaged", "last", or "auto", the average once it has forgotten its start.
    Raises:
        ValueError: when the file or the configuration is not of such a model, or they do not fit together.
    """
    for name, accepted in _FIXED.items():
        if getattr(config.model, name) != accepted:
            raise ValueError(f"model.{name}={getattr(config.model, name)!r}: accepted: {accepted!r}, as in their code")
    if config.data.img_size != config.data.img_width:
        raise ValueError(f"data.img_width={config.data.img_width}: accepted: {config.data.img_size}; theirs are square")
    path = path / IMAGE_FILE if path.is_dir() else path
    held = _checkpoint(path, (_LAST, _AVERAGED, _ENCODER))
    step, train = held[_STEP], config.train
    start = train.ema_decay ** (step // train.ema_update_every)
    averaged = start <= _LARGEST_START if weights == "auto" else weights == "averaged"
    key = _AVERAGED if averaged else _LAST
    try:
        layout = layout_of_state(held[key])
    except ValueError as error:
        raise ValueError(f"{path}: {key}: {error}") from None
    model = dataclasses.replace(
        config.model, coordinate_convention="reference", encoder_block_norm=LAYOUTS["torch_dense"] == layout
    )
    config = dataclasses.replace(config, model=model)
    get_backend(model.backend)  # one that is missing must not wait for the first use of the run
    shapes = dataclasses.replace(model, backend="torch_dense")  # others try themselves on tensors when they are built
    with torch.device("meta"):
        denoiser = build_denoiser(shapes, config.data.channels, config.size)
        encoder = build_encoder(shapes, config.data.channels, config.size)
    tensors = {
        **_state(path, key, held, denoiser, layout, "denoiser."),
        **_state(path, _ENCODER, held, encoder, layout, "encoder."),
    }
    backend = next(name for name, its in LAYOUTS.items() if its == layout)
    notes = [
        f"stored by {backend}: model.coordinate_convention={model.coordinate_convention}, "
        f"model.encoder_block_norm={str(model.encoder_block_norm).lower()}",
        f"denoiser: {'their average' if averaged else 'the last step'}; {100 * start:.3f} % of their average is the "
        "random network that it started from",
        "encoder: the last step; they average no encoder, and trained the latent model on this one",
        f"not in the checkpoint, taken from the configuration: data.img_size={config.data.img_size}, "
        f"model.knn_neighbours={model.knn_neighbours}, model.uno_dropout, diffusion.*",
        "norms: epsilon 1e-5 throughout; their mixed precision has 1e-3 in those of the U-Net, so that outputs differ "
        "where activations are small",
    ]
    return ReferenceRun(config, tensors, step, {path.name: file_digest(path)}, notes)


def read_latent_run(path: Path, latents: Path | None, config: LatentConfig, weights: str = "auto") -> ReferenceRun:
    """The authors' latent model, and the statistics by which the latents that it was trained on were normalised.

    Their average starts from the latent model itself, so that "auto" always takes it.

    Args:
        path: `latent_checkpoint.pkl`, or the folder that holds it.
        latents: `latents.pkl`; by default the one beside `path`.
        config: the model.
        weights: "averaged", "last" or "auto".
    Raises:
        ValueError: when a file is not of such a model, or they do not fit together.
    """
    if config.model.learn_sigma:
        raise ValueError("model.learn_sigma=True: accepted: False, as in their code")
    path = path / LATENT_FILE if path.is_dir() else path
    latents = latents or path.with_name(LATENTS_FILE)
    held = _checkpoint(path, (_LAST, _AVERAGED))
    mean, std = _statistics(latents)
    with torch.device("meta"):
        model = build_latent_model(config.model, len(mean))
    key = _LAST if weights == "last" else _AVERAGED
    state = _state(path, key, held, model, LAYOUTS["torchsparse"])
    model.load_state_dict(state, assign=True)
    notes = [
        f"latent model: {'the last step' if key == _LAST else 'their average'}",
        f"latents of size {len(mean)}: deviations from {latents.name}, {std.min():.3g} to {std.max():.3g}; "
        + ("mean 0, which is what their latent model was trained with" if not mean.any() else "mean from there too"),
        "not in the checkpoint, taken from the configuration: diffusion.*",
    ]
    files = {file.name: file_digest(file) for file in (path, latents)}
    return ReferenceRun(config, LatentPrior(config, model, mean, std).to_tensors(), held[_STEP], files, notes)


def refuse_existing(configs: Sequence[ImageConfig | LatentConfig]) -> None:
    """Raise ValueError when the folder of each of these runs exists, or two are the same.

    One of two may be what a killed import came to; `write_runs` sees that.
    """
    paths = [run_path(config) for config in configs]
    if paths and all(path.exists() for path in paths):
        raise _exists(paths[0])
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise ValueError(f"{path}: both runs would be kept there; accepted: two values of run.experiment")


def _exists(path: Path) -> ValueError:
    return ValueError(f"{path} exists; accepted: another run.experiment or run.root_dir")


def write_runs(runs: Sequence[ReferenceRun]) -> None:
    """Write the folder of each run, which appears whole or not at all.

    Raises:
        ValueError: as `refuse_existing`, and when the folder of one exists and holds another.
    """
    refuse_existing([run.config for run in runs])
    unfinished = [temporary_of(run.path) for run in runs]
    for run in runs:
        sweep(run.path.parent, glob.escape(run.path.name))
    try:
        for run, folder in zip(runs, unfinished):
            _write(run, folder)
        missing = [(run, folder) for run, folder in zip(runs, unfinished) if not _is_there(run, folder)]
        for folder in {*unfinished} - {folder for _, folder in missing}:
            shutil.rmtree(folder)  # before the last rename, after which nothing sweeps
        for run, folder in missing:
            try:
                os.rename(folder, run.path)
            except OSError:
                refuse_existing([run.config])  # made meanwhile
                raise
    finally:
        for folder in unfinished:
            shutil.rmtree(folder, ignore_errors=True)


def _is_there(run: ReferenceRun, folder: Path) -> bool:
    """Whether the folder of a run exists, with the same files as this one; ValueError where it has others."""
    if not run.path.exists():
        return False
    for file in folder.iterdir():
        there = run.path / file.name
        if not there.is_file() or file_digest(there) != file_digest(file):
            raise _exists(run.path)
    return True


def _write(run: ReferenceRun, folder: Path) -> None:
    config = plain(dataclasses.asdict(run.config))
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    header = {"config": config, "step": run.step, "versions": versions, "imported": run.files, "notes": run.notes}
    save_weights(folder / WEIGHTS, run.tensors, header)
    write_json(folder / "config.json", config)


def _checkpoint(path: Path, states: Sequence[str]) -> dict[str, Any]:
    """A checkpoint of theirs with these states of networks in it."""
    held = load_plain(path, mmap=True)
    known = {_STEP, _OPTIMISER, *states}
    if not isinstance(held, dict) or not known - {_OPTIMISER} <= set(held):
        found = f"the keys {', '.join(map(str, held))}" if isinstance(held, dict) else f"a {type(held).__name__}"
        raise ValueError(f"{path} holds {found[:200]}; accepted: a checkpoint with {', '.join(sorted(known))}")
    if set(held) - known:
        extra = ", ".join(sorted(map(str, set(held) - known)))
        raise ValueError(f"{path} holds {extra[:200]} too, of unknown meaning; accepted: {', '.join(sorted(known))}")
    if type(held[_STEP]) is not int or held[_STEP] < 0:
        raise ValueError(f"{path}: {_STEP} is {str(held[_STEP])[:50]!r}; accepted: a number of steps")
    for key in states:
        tensors = held[key].items() if isinstance(held[key], Mapping) else [(None, None)]
        if not all(isinstance(name, str) and _is_plain(value) for name, value in tensors):
            raise ValueError(f"{path}: {key} is no state of a network; accepted: tensors by name")
    return held


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor of floating-point numbers, which files can hold other kinds of too."""
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return dense and value.is_floating_point()


def _state(
    path: Path, key: str, held: dict[str, Any], network: nn.Module, layout: str, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """The state of `network` from the one called `key` of a checkpoint, with `prefix` before every name."""
    try:
        state = state_from_reference(network, held[key], layout)
    except ValueError as error:
        raise ValueError(f"{path}: {key}: {error}; accepted: the model that the configuration describes") from None
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key}: {name} is not finite; accepted: a model that has not diverged")
    return {prefix + name: tensor for name, tensor in state.items()}


def _statistics(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, float64 (D,), as their code keeps them: behind the latents of both splits, or, of a
    stochastic encoder, behind their mu and logvar. That mean is zero whatever the latents' own was.
    """
    held = load_plain(path, mmap=True)
    tensors = isinstance(held, tuple) and all(_is_plain(part) and part.ndim == 2 for part in held)
    if not tensors or len(held) not in (4, 6):
        raise ValueError(f"{path} holds no latents; accepted: the {LATENTS_FILE} of their latent training")
    (mean, std), size = held[-2:], held[0].shape[1]
    if not mean.shape == std.shape == (1, size):
        raise ValueError(
            f"{path} holds latents of size {size}, a mean of shape {tuple(mean.shape)} and a deviation of shape "
            f"{tuple(std.shape)}; accepted: {(1, size)} of both"
        )
    mean, std = mean.double().flatten(), std.double().flatten()
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"{path}: deviations of latents are zero or not finite; nothing can be sampled with them")
    return mean, std
