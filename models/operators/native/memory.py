"""Memory for large results on a CPU, kept and given out again, as PyTorch itself does on GPUs.

A system clears fresh memory, page by page, at its first touch: for a large lattice that takes as long as the
arithmetic. Blocks come in large pages where the system has them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import weakref

import torch

_LARGE = 1 << 23  # bytes from which on a result comes from here
_PAGE = 1 << 21  # blocks are multiples of a large page
_PATIENCE = 200  # requests after which a free block that none of them took is given back
_MAPPED = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else None

_free: list[tuple[mmap.mmap, int]] = []  # blocks without a tensor, and the request that took each last
_requests = itertools.count()


def empty(*shape: int) -> torch.Tensor:
    """A float32 tensor with arbitrary contents."""
    count = math.prod(shape)
    if 4 * count < _LARGE or _MAPPED is None:
        return torch.empty(shape, dtype=torch.float32)
    number = next(_requests)
    block = _take(4 * count, number)
    lease = memoryview(block)  # which the tensor's storage refers to until its last view is gone
    weakref.finalize(lease, _free.append, (block, number)).atexit = False
    return torch.frombuffer(lease, dtype=torch.float32, count=count).view(shape)


def release() -> int:
    """Give all free blocks back to the system; returns their bytes."""
    released = 0
    while _free:
        with contextlib.suppress(IndexError):  # another thread took the last
            released += len(_free.pop()[0])
    return released


def _take(nbytes: int, number: int) -> mmap.mmap:
    """A free block of about this size, or a new one."""
    for entry in sorted(_free, key=lambda entry: len(entry[0])):
        if nbytes <= len(entry[0]) <= nbytes + nbytes // 4 + _PAGE:
            with contextlib.suppress(ValueError):  # another thread took it
                _free.remove(entry)
                return entry[0]
    for entry in list(_free):
        if number - entry[1] > _PATIENCE:
            with contextlib.suppress(ValueError):
                _free.remove(entry)
    block = mmap.mmap(-1, -(-nbytes // _PAGE) * _PAGE, **_MAPPED)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them goes on as before
            block.madvise(mmap.MADV_HUGEPAGE)
    return block
