"""Where the weights of a model are: a run, a file, or the name of a model in the folder weights/ of this project."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from configs.schema import ImageConfig, LatentConfig
from infty_diff import __version__
from runtime.checkpoint import load_weights, save_weights
from runtime.files import plain, sweep, temporary_of
from runtime.stored import Config, config_from, require_config, stage_of, weights_path

IMAGE, LATENT = "image.safetensors", "latent.safetensors"  # of a saved model; its sampling options are in the first
FOLDER = Path(__file__).resolve().parents[1] / "weights"
_LOCAL = {"run": ("root_dir", "wandb_dir"), "data": ("root_dir",), "train": ("init_from",)}  # paths of one machine


@dataclass(frozen=True)
class Files:
    """The weights of a model: of stage one, and where they are kept together also of stage two."""

    image: Path
    latent: Path | None = None


def shipped_names() -> list[str]:
    """The names of the models in weights/."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{IMAGE}"))


def resolve(given: str | Path, weights: str = "newest") -> Files:
    """The files that a user means. What is there as a path is taken as one, before it is looked up as a name.

    Args:
        given: the folder of a run, a folder that `InftyDiff.save` wrote, a file of weights, or the name of a model in
            weights/.
        weights: of a run, "newest" or "best" (`runtime.stored.weights_path`).
    Raises:
        ValueError: for a name that is none of these; says which there are. For weights that a run does not have, and
            for any but the newest of what is not a run.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return _only(Files(path), weights)
    if not path.exists() and len(path.parts) == 1:
        path = FOLDER / path
        if not path.is_dir():
            there = ", ".join(shipped_names()) or "none is there"
            raise ValueError(
                f"{given} is no run and no model; accepted: the folder of a run, a file of weights, or the name of a "
                f"model in weights/ ({there})"
            )
    if (path / IMAGE).exists():
        return _only(Files(path / IMAGE, path / LATENT if (path / LATENT).exists() else None), weights)
    return Files(weights_path(path, weights))


def _only(files: Files, weights: str) -> Files:
    if weights != "newest":
        raise ValueError(f"weights is {weights!r}, but {files.image} is not of a run; accepted: newest")
    return files


def load_stage(
    file: Path, stage: type[Config], given: Config | None = None
) -> tuple[Config, dict[str, torch.Tensor], dict[str, Any]]:
    """The configuration of a file of weights, its tensors and its header; `given` counts in place of the first.

    Raises:
        ValueError: when the file is missing or damaged, or belongs to the other stage.
    """
    tensors, header = load_weights(file)
    stored = header.get("config", {})
    require_config(stored, str(file))
    if stage_of(stored) not in (stage, None):
        raise ValueError(f"{file} has weights of {stage_of(stored).__name__}; accepted: weights of {stage.__name__}")
    return given or config_from(stored, stage, str(file)), tensors, header


def save_stages(
    folder: str | Path,
    stages: Mapping[str, tuple[ImageConfig | LatentConfig, Mapping[str, torch.Tensor], dict[str, Any]]],
    half: bool,
    finish: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write a folder of weights, whole or not at all. Paths of this machine are left out of the configurations.

    Args:
        folder: a new or an empty one.
        stages: name of the file -> configuration, tensors, and what else its header says.
        half: round float32 tensors to float16.
        finish: called with the folder of the files before they are moved to `folder`, to add others.
    Raises:
        ValueError: when the folder holds something.
        FloatingPointError: when a tensor is not finite, or too large for half precision.
    """
    folder = Path(folder).expanduser().absolute()
    _require_empty(folder)
    temporary = temporary_of(folder)
    sweep(folder.parent, glob.escape(folder.name))
    try:
        for name, (config, tensors, facts) in stages.items():
            header = {**facts, "config": _portable(config), "version": __version__}
            save_weights(temporary / name, {k: _rounded(v) if half else v for k, v in tensors.items()}, header)
        finish(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            _require_empty(folder)  # which it was at first
            raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)
    return folder


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; accepted: a new or an empty folder")


def _portable(config: ImageConfig | LatentConfig) -> dict[str, Any]:
    sections = plain(asdict(config))
    for section, names in _LOCAL.items():
        for name in names:
            sections[section].pop(name, None)
    return sections


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.dtype is torch.float32 else tensor
