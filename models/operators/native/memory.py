"""Memory for large results on a CPU, kept and given out again, as PyTorch itself does on GPUs.

A system clears fresh memory, page by page, at its first touch: for a large lattice that takes as long as the
arithmetic. Blocks come in large pages where the system has them.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref

import torch

_LARGE = 1 << 23  # bytes from which on a result comes from here
_PAGE = 1 << 21  # blocks are multiples of a large page
_PATIENCE = 200  # requests after which a free block that none of them took is given back
_MAPPED = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else None


class _Pool:
    """Blocks in use and free ones; never more in all than were once in use together."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a tensor may be collected, and its block come back, within any statement
        self._free: list[tuple[int, mmap.mmap]] = []  # the request that took each last; longest unused first
        self._in_use = self._most_in_use = self._requests = 0

    def lease(self, nbytes: int) -> memoryview:
        """Memory that comes back when nothing refers to what is returned any more."""
        with self._lock:
            self._requests += 1
            while self._free and self._requests - self._free[0][0] > _PATIENCE:
                self._free.pop(0)
            block = self._fitting(nbytes) or self._new(nbytes)
            self._in_use += len(block)
            self._most_in_use = max(self._most_in_use, self._in_use)
            lease = memoryview(block)
            weakref.finalize(lease, self._back, self._requests, block).atexit = False
            return lease

    def release(self) -> int:
        """Give all free blocks back to the system; returns their bytes."""
        with self._lock:
            released = sum(len(block) for _, block in self._free)
            self._free, self._most_in_use = [], self._in_use
            return released

    def _back(self, request: int, block: mmap.mmap) -> None:
        with self._lock:
            self._in_use -= len(block)
            self._free.append((request, block))
            self._free.sort(key=lambda entry: entry[0])

    def _fitting(self, nbytes: int) -> mmap.mmap | None:
        entries = [entry for entry in self._free if nbytes <= len(entry[1]) <= nbytes + nbytes // 4 + _PAGE]
        if not entries:
            return None
        smallest = min(entries, key=lambda entry: len(entry[1]))
        self._free.remove(smallest)
        return smallest[1]

    def _new(self, nbytes: int) -> mmap.mmap:
        size = -(-nbytes // _PAGE) * _PAGE
        room = max(self._most_in_use, self._in_use + size) - self._in_use - size  # for free blocks
        held = sum(len(block) for _, block in self._free)
        while held > room:
            held -= len(self._free.pop(0)[1])
        block = mmap.mmap(-1, size, **_MAPPED)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without them goes on as before
                block.madvise(mmap.MADV_HUGEPAGE)
        return block


_pool = _Pool()
release = _pool.release


def empty(*shape: int) -> torch.Tensor:
    """A float32 tensor with arbitrary contents."""
    count = math.prod(shape)
    if 4 * count < _LARGE or _MAPPED is None:
        return torch.empty(shape, dtype=torch.float32)
    return torch.frombuffer(_pool.lease(4 * count), dtype=torch.float32, count=count).view(shape)
