"""Weights and other tensors on disk: safetensors with a header, atomic and checked, as networks want them.

A file says in which format it is and carries a SHA-256 of its tensors and header, in the header. Files without are not
checked.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from configs.validate import one_line
from runtime.checkpoint import FORMAT, NO_DIGEST, DamagedFile, require_finite, too_new
from runtime.files import present, sweep, to_json, write_atomic
from runtime.stored import GUARD, read_header

log = logging.getLogger(__name__)


def save_weights(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Write inference weights as safetensors with `header` (config, step, versions) as JSON inside, atomically.

    Raises:
        FloatingPointError: when a tensor is not finite; then nothing is written.
        OSError: when they cannot be written; then what was there is as it was.
    """
    require_finite(tensors)
    sweep(path.parent)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = to_json({GUARD: {"format": FORMAT, "sha256": NO_DIGEST}, **header})
    text = text.replace(NO_DIGEST, _tensor_digest(plain, text), 1)
    # One entry alone: safetensors writes several in an order that changes from call to call.
    write_atomic(path, lambda temporary: save_file(plain, temporary, metadata={"header": text}))


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the header of a safetensors file of this project.

    Raises:
        ValueError: when the file is missing, damaged, of a newer format, or was not written by `save_weights`.
    """
    return _checked(path, dict)


def open_weights(path: Path) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """As `load_weights`, but each tensor is read, and checked beforehand, without the others in memory."""
    return _checked(path, lambda stored: stored)


def stored_step(path: Path) -> int:
    """The step of a file of weights; -1 where there is no whole one."""
    try:
        step = open_weights(path)[1].get("step")
    except ValueError:
        return -1
    return step if isinstance(step, int) else -1


class _Stored(Mapping[str, torch.Tensor]):
    """The tensors of an open safetensors file, read when they are asked for."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_Tensors = TypeVar("_Tensors", bound=Mapping[str, torch.Tensor])


def _checked(path: Path, held: Callable[[_Stored], _Tensors]) -> tuple[_Tensors, dict[str, Any]]:
    """The tensors of a file, as `held` takes them from it, and its header; raises as `load_weights`."""
    header = read_header(path)
    try:
        file = safe_open(path, framework="pt")
        text, tensors = file.metadata()["header"], held(_Stored(file))
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path}: not a readable safetensors file ({one_line(error)})") from None
    guard = json.loads(text).get(GUARD)
    number, digest = (guard.get(key) for key in ("format", "sha256")) if isinstance(guard, dict) else (None, None)
    if isinstance(number, int) and number > FORMAT:
        raise ValueError(too_new(path, number))
    guarded = isinstance(number, int) and isinstance(digest, str)
    if guarded and digest != _tensor_digest(tensors, text.replace(digest, NO_DIGEST, 1)):
        raise DamagedFile(f"{path}: is damaged: its checksum is another")
    if not guarded and (guard is not None or "sha256" in text[:60]):
        raise DamagedFile(f"{path}: is damaged: its checksum is not readable")
    try:
        require_finite(tensors)
    except FloatingPointError as error:
        raise DamagedFile(f"{path}: is of no use: {error}") from None
    return tensors, header


def load_cache(
    path: Path, key: dict[str, Any], shapes: Mapping[str, tuple[int | None, ...]]
) -> dict[str, torch.Tensor] | None:
    """The tensors that `save_weights` kept under `key` as header, or None: to be computed, anew where damaged.

    shapes: of each tensor that belongs there; None for a length that is not known.
    """
    if not present(path):
        return None
    try:
        tensors, header = load_weights(path)
    except ValueError as error:
        log.warning("%s; computed anew", error)
        return None
    if header != key:
        return None
    right = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if right.keys() != shapes.keys() or not all(_fits(right[name], shape) for name, shape in shapes.items()):
        log.warning("%s: holds tensors %s; accepted: %s; computed anew", path, right, dict(shapes))
        return None
    return tensors


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(wanted in (None, length) for length, wanted in zip(found, shape))


def _tensor_digest(tensors: Mapping[str, torch.Tensor], header: str) -> str:
    """SHA-256 over the header and the names, types, shapes and values of tensors."""
    sha = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def load_networks(networks: Mapping[str, torch.nn.Module], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Load tensors named `network.tensor` into networks.

    Raises:
        ValueError: naming `where`, for a tensor that is missing, extra or of another shape; then nothing is loaded.
    """
    require_fitting(networks, tensors, where)
    for name, network in networks.items():
        prefix = f"{name}."
        network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def require_fitting(networks: Mapping[str, torch.nn.Module], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise ValueError, naming `where`, unless tensors named `network.tensor` are those of the networks."""
    own = {f"{name}.{key}": value for name, network in networks.items() for key, value in network.state_dict().items()}
    require_shapes(own, tensors, where)


def require_shapes(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise ValueError, naming `where`, unless tensors have the names and shapes of `own`."""
    faults = []
    for key in dict.fromkeys([*own, *tensors]):
        there, here = (list(s[key].shape) if key in s else "missing" for s in (tensors, own))
        if there != here:
            faults.append(f"{key} is {there} there, {here} here")
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise ValueError(f"{where}, where {faults[0]}{more}; accepted: a run with the same networks")
