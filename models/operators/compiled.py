"""The C kernels of these folders: built once by the system's compiler, kept in the user's cache, called through ctypes.

Building takes about a second, and no header of PyTorch or Python is needed. OpenMP resolves to the runtime that PyTorch
has loaded already, so both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

# The first that the compiler takes: GCC and Clang know all of the first; Apple's Clang has no OpenMP.
_OPTIONS = (
    ("-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-O3", "-march=native", "-fopenmp"),
    ("-O3", "-fopenmp"),
    ("-O3",),
)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels, or None where no compiler is found or none of its options works (logged once)."""
    sources = sorted(Path(__file__).parent.rglob("*.[ch]"))
    compiler = shlex.split(os.environ.get("CC") or "cc")
    name, cache = f"kernels-{_fingerprint(compiler, sources)}", _cache_folder()
    try:
        content = _kept(cache, name) or _build(compiler, sources)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the fast kernels cannot be built, using slower ones: %s", error)
        return None
    try:
        return ctypes.CDLL(str(_keep(content, cache, name)))
    except OSError as error:
        log.info("the fast kernels are kept for this process alone, as %s cannot be used: %s", cache, error)
    try:
        with tempfile.TemporaryDirectory() as folder:  # what is loaded stays when its file is gone
            return ctypes.CDLL(str(_keep(content, Path(folder), name)))
    except OSError as error:
        log.warning("the compiled kernels do not load, using slower ones: %s", error)
        return None


def call(name: str, *arguments: torch.Tensor | int | None) -> None:
    """Call a kernel with the addresses of contiguous CPU tensors (None: a null pointer) and 64-bit integers."""
    getattr(library(), name)(*map(_argument, arguments))


def _argument(value: torch.Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if value is None:
        return ctypes.c_void_p(None)
    assert value.is_contiguous() and value.device.type == "cpu"
    return ctypes.c_void_p(value.data_ptr())


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "infty-diff"


def _fingerprint(compiler: list[str], sources: list[Path]) -> str:
    """Of all that decides what the library is: sources, options, compiler and processor."""
    digest = hashlib.sha256(repr((_OPTIONS, compiler, _version(compiler), _processor())).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    """A home folder may be shared by machines whose processors differ in their instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _kept(folder: Path, name: str) -> bytes | None:
    """A library that was kept whole: its name ends in the digest of its content. Loading a cut one kills a process."""
    try:
        for path in sorted(folder.glob(f"{name}-*.so")):
            content = path.read_bytes()
            if path == _named(folder, name, content):
                return content
            log.warning("%s is damaged, and is built anew", path)
            path.unlink()
    except OSError:
        pass  # what cannot be read is built anew
    return None


def _keep(content: bytes, folder: Path, name: str) -> Path:
    """Write a library, whole or not at all; OSError where that cannot be done."""
    path = _named(folder, name, content)
    if path.exists():  # `_kept` has looked at it
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / path.name
        built.write_bytes(content)
        built.chmod(0o755)
        os.replace(built, path)
    return path


def _named(folder: Path, name: str, content: bytes) -> Path:
    return folder / f"{name}-{hashlib.sha256(content).hexdigest()[:24]}.so"


def _build(compiler: list[str], sources: list[Path]) -> bytes:
    """The library.

    Raises:
        OSError: no compiler, or one that fails with all options, with what it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernels.so"
        units = [source for source in sources if source.suffix == ".c"]
        for options in _OPTIONS:
            command = [*compiler, *options, "-std=gnu11", "-shared", "-fPIC", "-o", built, *units, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                return built.read_bytes()
            failure = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
    raise OSError(failure)
