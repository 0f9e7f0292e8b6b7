"""Training states on disk: atomic, rotated, checked, loaded without executing code.

A state says in which format it is and carries a SHA-256 of its file, in the comment at the end of the zip archive that
PyTorch writes. Files without are not checked.
"""

import errno
import hashlib
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from configs.validate import one_line
from runtime.files import sweep, write_atomic

log = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8,})\.pt")

FORMAT = 1
_SEAL = re.compile(rb"infty-diff (\d+) sha256 ([0-9a-f]{64})")
NO_DIGEST = "0" * 64  # in place of the digest, where that is computed
_SEAL_LENGTH = len(b"infty-diff 0001 sha256 ") + 64


class DamagedFile(ValueError):
    """A file whose content is not what was written, or that never was one of the kind."""


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, newest first; OSError when the folder cannot be read."""
    try:
        names = [_NAME.fullmatch(name) for name in os.listdir(folder)]
    except FileNotFoundError:
        return []
    return sorted((int(name[1]) for name in names if name), reverse=True)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int | None, keep_every: int = 0) -> Path:
    """Write the training state of `step` atomically and delete all but the newest `keep`, none for None.

    keep_every: states of multiples of it are kept beside those, 0 for none.

    Raises:
        FloatingPointError: when a tensor of the state is not finite; then nothing is written.
        OSError: when it cannot be written; then nothing is deleted.
    """
    path = checkpoint_path(folder, step)
    require_finite(state)
    sweep(folder)
    write_atomic(path, lambda temporary: _write_sealed(temporary, {"format": FORMAT, **state}))
    passing = [old for old in checkpoint_steps(folder) if not (keep_every and old % keep_every == 0)]
    for old in [] if keep is None else passing[keep:]:
        checkpoint_path(folder, old).unlink(missing_ok=True)
    return path


def drop_checkpoints(folder: Path, after: int) -> None:
    """Delete the training states of steps past `after`."""
    for step in checkpoint_steps(folder):
        if step > after:
            checkpoint_path(folder, step).unlink(missing_ok=True)


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
    """Return the training state of `step`.

    Raises:
        DamagedFile: when it is damaged, or holds no state of that step. ValueError: when it is missing, or of a newer
            format. OSError: when it cannot be read, which says nothing about what it holds.
    """
    path = checkpoint_path(folder, step)
    sealed = _check_seal(path)
    state = load_plain(path, device)
    if not isinstance(state, dict) or "step" not in state:
        raise DamagedFile(f"{path} holds no training state")
    if not isinstance(state["step"], int) or state["step"] != step:
        raise DamagedFile(f"{path} is not of the step in its name: it holds step {one_line(state['step'])[:50]}")
    if not sealed and state.get("format", 0):
        raise DamagedFile(f"{path} is damaged: its checksum is missing")
    try:
        require_finite(state)
    except FloatingPointError as error:
        raise DamagedFile(f"{path} is of no use: {error}") from None
    return state


def load_newest_checkpoint(
    folder: Path,
    device: torch.device | str = "cpu",
    check: Callable[[dict[str, Any], str], None] = lambda state, where: None,
) -> dict[str, Any] | None:
    """Return the newest training state that is not damaged, or None where there are no checkpoints at all.

    A damaged one is named in a warning and renamed to `step_XXXXXXXX.pt.damaged`, so that it counts no longer among
    those that are kept.

    check: raises ValueError for a state, read from the file that it names, which is not to be used; then all stays.

    Raises:
        ValueError: when all are damaged, or one is of a newer format. OSError: when one cannot be read.
    """
    faults: dict[Path, str] = {}
    for step in checkpoint_steps(folder):
        try:
            state = load_checkpoint(folder, step, device)
        except DamagedFile as error:
            faults[checkpoint_path(folder, step)] = str(error)
            continue
        check(state, str(checkpoint_path(folder, step)))
        for path, fault in faults.items():
            log.warning("checkpoint %s; using the one before it", fault)
            path.rename(path.with_name(f"{path.name}.damaged"))
        return state
    if faults:
        raise ValueError(
            f"{folder}: none of its {len(faults)} checkpoints loads ({next(iter(faults.values()))}); accepted: a whole "
            "copy of one of them, or another run.experiment"
        )
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """The file of the training state of a step."""
    return folder / f"step_{step:08d}.pt"


def _write_sealed(path: Path, state: dict[str, Any]) -> None:
    """Write a state with its checksum as the comment of the zip archive, which readers of such archives pass over."""
    with path.open("w+b") as file:
        torch.save(state, file)  # by its path the archive would hold its name, of this process
        end = file.seek(-2, os.SEEK_END)
        file.write(_SEAL_LENGTH.to_bytes(2, "little"))  # of the comment, empty so far
        file.seek(0)
        digest = _digest_of(file, end + 2)
        file.seek(0, os.SEEK_END)
        file.write(b"infty-diff %04d sha256 %s" % (FORMAT, digest.encode()))


def _digest_of(file: Any, size: int) -> str:
    """SHA-256 of the next `size` bytes of an open file."""
    sha = hashlib.sha256()
    while chunk := file.read(min(1 << 20, size)):
        sha.update(chunk)
        size -= len(chunk)
    return sha.hexdigest()


def _check_seal(path: Path) -> bool:
    """Whether a file carries a checksum, which is checked; raises as `load_checkpoint`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END) - _SEAL_LENGTH
            file.seek(max(size, 0))
            seal = _SEAL.fullmatch(file.read())
            if seal is None:
                return False
            if int(seal[1]) > FORMAT:
                raise ValueError(too_new(path, int(seal[1])))
            file.seek(0)
            if _digest_of(file, size) != seal[2].decode():
                raise DamagedFile(f"{path} is damaged: its checksum is another")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise _cannot_read(path, error) from error
    return True


def _is_of_the_machine(error: Exception) -> bool:
    """Whether reading failed for want of memory or by the disk, whatever the file holds."""
    if isinstance(error, OSError):
        return error.errno != errno.EINVAL  # a short file makes PyTorch look before its beginning
    # On a CPU PyTorch has no exception of its own for want of memory.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _cannot_read(path: Path, error: Exception) -> OSError:
    reason = (isinstance(error, OSError) and error.strerror) or one_line(error) or type(error).__name__
    return OSError(f"{path}: cannot be read ({reason}); accepted: the same command once it can")


def too_new(path: Path, number: int) -> str:
    return f"{path}: is in format {number}; accepted: formats up to {FORMAT}, or a newer version of this project"


def load_plain(path: Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> Any:
    """Return what `torch.save` wrote to `path`: tensors and plain values alone, for no code of a file is executed.

    mmap: leave tensors in the file until they are read, where its format allows it.

    Raises:
        DamagedFile: when the file is damaged, or holds anything else. ValueError: when it is missing.
        OSError: when it cannot be read, or does not fit into memory.
    """
    try:
        with warnings.catch_warnings():  # about other pickles, which are refused anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # reading arbitrary bytes as a pickle can end in any of them
        if _is_of_the_machine(error):
            raise _cannot_read(path, error) from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise DamagedFile(f"{path} asks for {code[1]}; accepted: tensors and plain values") from None
        advice = isinstance(error, pickle.UnpicklingError)  # PyTorch's is to load without this protection
        said = [] if advice else [line.split(". ")[0] for line in str(error).splitlines()[:1]]
        reason = ": ".join([type(error).__name__, *said])
        raise DamagedFile(f"{path} is damaged, or no file of PyTorch ({reason})") from None
