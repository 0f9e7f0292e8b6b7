"""How the C library gives memory back, for computations on a CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> None:
    """Let this process keep what it frees, as PyTorch itself does on GPUs; without effect outside of glibc.

    By default large blocks go back to the system at once, which clears them again, page by page, when they are next
    asked for. For a large lattice that takes longer than the arithmetic. The process then holds what it once needed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
