"""Whether kernels in Triton can be launched here, asked in one place."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import sysconfig
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)


@lru_cache
def _missing() -> str | None:
    """What Triton lacks here, logged once; None if nothing. A C compiler builds the launchers of its kernels."""
    missing = None
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if importlib.util.find_spec("triton") is None:
        missing = "the package triton"
    elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing = "a C compiler (CC, gcc or clang)"
    elif not headers.exists():
        missing = f"Python's headers ({headers})"
    if missing is not None:
        log.warning("Triton needs %s, which is missing: using slower kernels on the GPU", missing)
    return missing


def available() -> bool:
    """Whether kernels in Triton, those of `torch.compile` too, can be launched on a GPU here."""
    return _missing() is None
