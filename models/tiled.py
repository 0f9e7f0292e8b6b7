"""The networks on full lattices too large to hold at once: tile by tile, with the same result.

A convolution with a window of k' pixels knows its result ⌊k'/2⌋ pixels away from the edge of what it is given, or up to
the edge where that is the lattice's. So a tile is computed from a window larger by that much for each convolution still
to come, as a lattice of its own, and shrinks to what is known after each block. The grid in the middle needs all tiles
before any can go on; features are not kept meanwhile but computed again.

Letters: B batch, C channels, H × W lattice, U side of the grid, F channels of the sparse level.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from diffusion.coordinates import Points, Size
from models.coarse_nodes import GridNodes
from models.operators.sparse_conv.backend import kernel_window
from models.rectangles import Rectangle, tiling
from models.sparse_block import SparseBlock

if TYPE_CHECKING:
    from models.operators.pointwise.norm_mlp import Affine
    from models.sparse_unet import OfBlock, SparseDescent, SparseUNet


def check(network: SparseUNet) -> None:
    """Raise ValueError where the training resolution needs tiles, and `tile_points` are too few for one."""
    if network.needs_tiles(Points(network.train_size)):
        tiling(network.train_size, _margin(network, network.train_size), network.sparse_spec.tile_points)


def descend(
    network: SparseDescent,
    x: torch.Tensor,
    lattice: Size,
    nodes: GridNodes,
    affines: Sequence[OfBlock] | None = None,
) -> torch.Tensor:
    """Features (B, U, U, G) of the grid from the function x (B, H·W, C) on a lattice; as `SparseDescent.descend`."""
    reach, blocks = _reach(network, lattice), len(network.down_blocks)
    margin = _times(blocks, reach)

    def pieces() -> Iterator[tuple[Rectangle, torch.Tensor]]:
        for tile in tiling(lattice, margin, network.sparse_spec.tile_points):
            of_blocks = _down(network, x, lattice, tile.grown(margin, lattice), affines)
            at, h = deque(of_blocks, maxlen=1).pop()
            yield tile, tile.cut(h, at)

    return network.to_grid(nodes.enter_pieces(pieces()))


def evaluate(
    network: SparseUNet,
    x: torch.Tensor,
    lattice: Size,
    nodes: GridNodes,
    down: Sequence[OfBlock],
    of_grid: Sequence[Affine],
    up: Sequence[OfBlock],
) -> torch.Tensor:
    """The denoiser's prediction (B, H·W, C_out) for x (B, H·W, C) on a lattice. down, of_grid, up: of its blocks."""
    grid = network.grid(descend(network, x, lattice, nodes, down), of_grid)
    grid = F.linear(grid, network.from_grid.weight)
    image = None
    margin = _margin(network, lattice)
    for tile in tiling(lattice, margin, network.sparse_spec.tile_points):
        skips = list(_down(network, x, lattice, tile.grown(margin, lattice), down))
        at = skips[-1][0]
        h = nodes.leave_at(grid, at.ids(lattice[1], x.device)) + network.from_grid.bias.to(grid.dtype)
        for block, of_block in zip(network.up_blocks, up):
            held, skip = skips.pop()
            h, at = _step(network, block, h, at, lattice, skip=at.cut(skip, held), affines=of_block)
        part = network.linear_out(tile.cut(h, at)).unflatten(1, tile.size)
        image = part.new_empty(len(x), *lattice, part.shape[3]) if image is None else image
        image[:, tile.top : tile.bottom, tile.left : tile.right] = part
    return image.flatten(1, 2)


def _down(
    network: SparseDescent,
    x: torch.Tensor,
    lattice: Size,
    at: Rectangle,
    affines: Sequence[OfBlock] | None,
) -> Iterator[tuple[Rectangle, torch.Tensor]]:
    """What each block on the way in makes of a window of x, and the window in which that is known."""
    whole = Rectangle(0, lattice[0], 0, lattice[1])
    h = network.linear_in(at.cut(x, whole))
    for block, of_block in zip(network.down_blocks, affines or [(None, None)] * len(network.down_blocks)):
        h, at = _step(network, block, h, at, lattice, affines=of_block)
        yield at, h


def _step(
    network: SparseDescent, block: SparseBlock, h: torch.Tensor, at: Rectangle, lattice: Size, **others: Any
) -> tuple[torch.Tensor, Rectangle]:
    spec = network.sparse_spec
    kernel_shape, span = kernel_window(spec.kernel_size, lattice, network.train_size, network.convention)
    plan = network.backend.plan(Points(at.size), h.shape[0], kernel_shape, spec.kernel_size, h.device, span)
    known = at.shrunk(_reach(network, lattice), lattice)
    return known.cut(block(h, replace(plan, lattice=lattice), **others), at), known


def _margin(network: SparseUNet, lattice: Size) -> Size:
    """How far all blocks see together."""
    return _times(len(network.down_blocks) + len(network.up_blocks), _reach(network, lattice))


def _reach(network: SparseDescent, lattice: Size) -> Size:
    """How far a block sees, along each axis."""
    kernel_size = network.sparse_spec.kernel_size
    kernel_shape, _ = kernel_window(kernel_size, lattice, network.train_size, network.convention)
    return _times(network.down_blocks[0].convolutions, (kernel_shape[0] // 2, kernel_shape[1] // 2))


def _times(factor: int, margin: Size) -> Size:
    return factor * margin[0], factor * margin[1]
