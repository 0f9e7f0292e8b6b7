"""Weight files of networks made elsewhere."""

from __future__ import annotations

import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, a PyTorch file (no code in it is run) or a TorchScript archive.

    Raises:
        ValueError: when there is no such file or it holds no tensors.
    """
    path = existing_file(path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's notes on archives
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # on a file of another kind the unpickler raises nearly anything
        return load_script(path).state_dict()
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no table of tensors; accepted: a state dict")
    return state


def load_script(path: str | Path) -> torch.jit.ScriptModule:
    """A TorchScript archive on the CPU, in evaluation mode.

    Raises:
        ValueError: when there is no such file or it is none.
    """
    path = existing_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        kinds = "a safetensors file, a PyTorch state dict, a TorchScript archive"
        raise ValueError(f"{path}: cannot be read ({_first_line(error)}); accepted: {kinds}") from None


def existing_file(path: str | Path) -> Path:
    """`path` with ~ expanded; ValueError unless it is a file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; accepted: a file of weights")
    return path


def hub_folder() -> Path:
    """Where torch and torchvision keep downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def cached_or_downloaded(
    what: str, path: Path, urls: list[str], sha256: str | None = None, otherwise: str | None = None
) -> Path:
    """`path`, filled from the first of `urls` that answers if it is not there yet.

    Args:
        what: the network, for the message.
        sha256: beginning of the digest of what the first url gives.
        otherwise: what else is accepted, for the message.
    Raises:
        ValueError: when none can be had.
    """
    path = path.expanduser()
    if path.is_file():
        return path
    reasons = []
    for url in urls:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256 if url == urls[0] else None)
            return path
        except (OSError, RuntimeError) as error:
            reasons.append(f"{url} ({_first_line(error)})")
    raise ValueError(
        f"weights of {what}: not in {path}, not to be had from {' nor from '.join(reasons)}; "
        f"accepted: a file of weights{f', {otherwise}' if otherwise else ''}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
