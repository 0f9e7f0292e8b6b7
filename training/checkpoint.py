"""Training states and inference weights on disk: atomic, rotated, loaded without executing code."""

import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training.files import write_atomic

log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8})\.pt")


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, newest first."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step_*.pt"))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the training state of `step` atomically and delete all but the newest `keep`."""
    path = folder / f"step_{step:08d}.pt"
    write_atomic(path, lambda temporary: torch.save(state, temporary))
    for old in checkpoint_steps(folder)[keep:]:
        (folder / f"step_{old:08d}.pt").unlink(missing_ok=True)
    return path


def load_newest_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Return the newest readable training state, or None; a damaged one is named in a warning and passed over."""
    for step in checkpoint_steps(folder):
        path = folder / f"step_{step:08d}.pt"
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, reason)
    return None


def save_weights(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Write inference weights as safetensors with `header` (config, step, versions) as JSON inside, atomically."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(plain, temporary, metadata={"header": json.dumps(header)}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the header of a safetensors file of this project.

    Raises:
        ValueError: when the file is missing, damaged, or was not written by `save_weights`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("header")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; accepted: weights written by training") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if header is None:
        raise ValueError(f"{path}: has no configuration inside; accepted: weights written by training")
    return tensors, json.loads(header)
