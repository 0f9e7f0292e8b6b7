"""The weights of one stage in a file, and of both in a folder that `InftyDiff.save` writes."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.schema import ImageConfig, LatentConfig
from infty_diff import __version__
from runtime.files import plain, sweep, temporary_of
from runtime.stored import Config, config_from, require_config, stage_of
from runtime.weights import load_weights, save_weights

_LOCAL = {"run": ("root_dir", "wandb_dir"), "data": ("root_dir",), "train": ("init_from",)}  # paths of one machine


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
