"""Weight files of networks made elsewhere."""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import safetensors
import safetensors.torch
import torch

# SHA-256 of the TorchScript archives that are opened. Opening one runs what it says, so others are refused unopened.
CLIP_SHA256 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"  # OpenAI's ViT-B-32.pt
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"  # inception-2015-12-05.pt
SCRIPTS = {CLIP_SHA256: "ViT-B-32.pt", INCEPTION_SHA256: "inception-2015-12-05.pt"}


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, a PyTorch file (no code in it is run) or a TorchScript archive of `SCRIPTS`.

    Raises:
        ValueError: when there is no such file or it holds no tensors.
    """
    path = existing_file(path)
    if _is_script(path):
        return load_script(path).state_dict()
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's notes on archives
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a file of another kind the unpickler raises nearly anything
        kinds = "a safetensors file, a PyTorch state dict"
        raise ValueError(f"{path}: cannot be read ({_first_line(error)}); accepted: {kinds}") from None
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    ):
        raise ValueError(f"{path}: holds no table of tensors; accepted: a state dict")
    return state


def load_script(path: str | Path) -> torch.jit.ScriptModule:
    """A TorchScript archive of `SCRIPTS` on the CPU, in evaluation mode.

    Raises:
        ValueError: when there is no such file, or it is another one.
    """
    path = existing_file(path)
    content = path.read_bytes()  # once: what is opened is what was looked at
    digest = hashlib.sha256(content).hexdigest()
    if digest not in SCRIPTS:
        raise ValueError(
            f"{path}: its SHA-256 {digest[:16]}… is not that of a known TorchScript archive, and opening another could "
            f"run anything; accepted: {', '.join(SCRIPTS.values())} as published, or a file of tensors alone"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()


def _is_script(path: Path) -> bool:
    """Whether a file is an archive of code; nothing of it is run to see that."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except Exception:  # a damaged directory of an archive raises nearly anything
        return False


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
