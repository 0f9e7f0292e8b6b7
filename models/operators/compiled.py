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
    path = _cache_folder() / f"kernels-{_fingerprint(compiler, sources)}.so"
    if not path.exists():
        failure = _build(compiler, sources, path)
        if failure is not None:
            log.warning("no C compiler for the fast kernels, using slower ones: %s", failure)
            return None
    try:
        return ctypes.CDLL(str(path))
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


def _build(compiler: list[str], sources: list[Path], path: Path) -> str | None:
    """Write the library to `path`, whole or not at all; return why it could not be built."""
    failure = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            units = [source for source in sources if source.suffix == ".c"]
            for options in _OPTIONS:
                command = [*compiler, *options, "-std=gnu11", "-shared", "-fPIC", "-o", built, *units, "-lm"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=300)
                if done.returncode == 0:
                    os.replace(built, path)
                    return None
                failure = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
    except (OSError, subprocess.SubprocessError) as error:
        failure = str(error)
    return failure
