"""How a process holds memory, for computations on a CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let this process keep what it frees, as PyTorch itself does on GPUs.

    By default glibc gives large blocks back to the system at once. The system clears them again, page by page, when
    they are next asked for: for a large lattice that takes longer than the arithmetic. The process then holds what it
    once needed. Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def release_freed_memory() -> None:
    """Give what is kept back to the system, once; without effect outside of glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
