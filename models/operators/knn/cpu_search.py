"""The nearest present pixels of every node of a grid, and the transpose of a gather, on a CPU, in C (`search.c`).

Letters: B batch, M points, H × W lattice, Q nodes, K nearest points, W width of the gather, E entries, N source rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusion.coordinates import Size
from models.operators import compiled
from models.operators.knn.pixel_order import PixelTable

_MOST_ROWS = 2**31 - 1  # the map of present pixels is int32


def first_present(
    index: torch.Tensor, size: Size, table: PixelTable, k: int, width: int
) -> tuple[torch.Tensor, ...] | None:
    """What all nodes read of the pixels `index` (B, M), K ≤ M, K ≥ 1: the parts of `search.Nearest`, and rows.

    rows: int64 (E,), places in the list of points, through the batch laid end to end. None if the table does not tell
    for some node, or if ids are repeated or outside the lattice.
    """
    batch, points = index.shape
    if index.numel() > _MOST_ROWS:
        return None
    (nodes, length), pixels = table.ids.shape, size[0] * size[1]
    present = torch.empty(batch, pixels, dtype=torch.int32)
    faults = torch.empty(batch, dtype=torch.int32)
    compiled.call("infty_index_map", index.contiguous(), batch, points, *size, 1, 1, present, faults)
    if bool(faults.any()):
        return None
    before, counts = torch.empty(2, batch * nodes, dtype=torch.int64)
    sizes = (batch, pixels, nodes, length, k)
    compiled.call("infty_nearest_count", present, table.ids, table.begins, table.ends, *sizes, width, before, counts)
    if not bool(counts.all()):
        return None
    first = F.pad(counts.cumsum(0), (1, 0))
    ids, rows = torch.empty(2, int(first[-1]), dtype=torch.int64)
    squared, shares = torch.empty(2, len(ids), dtype=torch.float32)
    found = (ids, rows, squared, shares)
    compiled.call("infty_nearest_fill", present, table.ids, table.squared, before, first, *sizes, *found)
    return ids, squared, shares, first, rows


def transposed(rows: torch.Tensor, source_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of entries that read `rows`, integers (E,) from 0 to N − 1: their order by row, and where each row begins in it.

    Both int64, (E,) and (N + 1,). Entries that read the same row keep their order.
    """
    order, begins = (torch.empty(n, dtype=torch.int64) for n in (len(rows), source_rows + 1))
    compiled.call("infty_transpose", rows.long().contiguous(), len(rows), source_rows, order, begins)
    return order, begins
