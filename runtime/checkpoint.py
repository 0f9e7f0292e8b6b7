"""Training states and inference weights on disk: atomic, rotated, loaded without executing code."""

import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from runtime.files import to_json, write_atomic
from runtime.stored import read_header

log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8})\.pt")


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, newest first."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step_*.pt"))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int | None) -> Path:
    """Write the training state of `step` atomically and delete all but the newest `keep`, none for None.

    Raises:
        FloatingPointError: when a tensor of the state is not finite; then nothing is written.
    """
    path = _path(folder, step)
    require_finite(state)
    write_atomic(path, lambda temporary: torch.save(state, temporary))
    for old in [] if keep is None else checkpoint_steps(folder)[keep:]:
        _path(folder, old).unlink(missing_ok=True)
    return path


def drop_checkpoints(folder: Path, after: int) -> None:
    """Delete the training states of steps past `after`."""
    for step in checkpoint_steps(folder):
        if step > after:
            _path(folder, step).unlink(missing_ok=True)


def require_finite(state: Mapping[str, Any]) -> None:
    """Raise FloatingPointError, naming it, for the first tensor within nested mappings and lists that is not finite."""
    for name, tensor in _tensors(state):
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{name} is not finite")


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, (Mapping, list, tuple)):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def load_checkpoint(folder: Path, step: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the training state of `step`; ValueError when it is missing or damaged."""
    return load_plain(_path(folder, step), device)


def load_newest_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Return the newest readable training state, or None; a damaged one is named in a warning and passed over."""
    for step in checkpoint_steps(folder):
        try:
            return load_checkpoint(folder, step, device)
        except ValueError as error:
            log.warning("checkpoint %s; using the one before it", error)
    return None


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.pt"


def load_plain(path: Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> Any:
    """Return what `torch.save` wrote to `path`: tensors and plain values alone, for no code of a file is executed.

    mmap: leave tensors in the file until they are read, where its format allows it.

    Raises:
        ValueError: when the file is missing, damaged, or holds anything else.
    """
    try:
        with warnings.catch_warnings():  # about other pickles, which are refused anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # reading arbitrary bytes as a pickle can end in any of them
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{path} asks for {code[1]}; accepted: tensors and plain values") from None
        advice = isinstance(error, pickle.UnpicklingError)  # PyTorch's is to load without this protection
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[: 0 if advice else 1]])
        raise ValueError(f"{path} is damaged, or no file of PyTorch ({reason})") from None


def save_weights(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Write inference weights as safetensors with `header` (config, step, versions) as JSON inside, atomically.

    Raises:
        FloatingPointError: when a tensor is not finite; then nothing is written.
    """
    require_finite(tensors)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(plain, temporary, metadata={"header": to_json(header)}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the header of a safetensors file of this project.

    Raises:
        ValueError: when the file is missing, damaged, or was not written by `save_weights`.
    """
    header = read_header(path)
    return load_file(path), header
