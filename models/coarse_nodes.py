"""The nodes of the inner U-Net, and the way from the points to them and back.

The paper (section 4.2) names two ways to downsample a function known at points: "(1) selecting a subset of coordinates
and (2) interpolating points to a regularly spaced grid". Its model takes the second, once, and halves the grid after
that (`GridNodes`). The ablation "sparse downsampling" of Table 2 takes the first throughout (`PointNodes`), "performed
by randomly subsampling coordinates" or by equidistant subsampling: level l of the U-Net has as many points as the
grid would have nodes, each level a subset of the one above, and every 3 × 3 convolution is that of `point_conv`.

Letters: B batch, C channels, M points, U side of the grid, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from diffusion.coordinates import CoordinateConvention, Points
from models.interpolation import WeightedGather, grid_to_points, points_to_grid
from models.point_conv import Stencil, stencil_between
from models.rectangles import Rectangle

SUBSETS = ("random", "equidistant")
NODES = ("grid", *SUBSETS)  # what model.downsampling may be
_LAST = torch.iinfo(torch.int64).max


class GridNodes:
    """A regular U × U grid: weighted mean of the nearest points one way, bilinear reading the other."""

    pyramid = None

    def __init__(
        self,
        points: Points,
        batch: int,
        side: int,
        k: int,
        convention: CoordinateConvention,
        device: torch.device,
        plain: bool = False,
    ) -> None:
        self._geometry = (points, batch, (side, side))
        self._k, self._convention, self._device, self._plain = k, convention, device, plain

    def enter(self, h: torch.Tensor) -> torch.Tensor:
        """Features at the points (B, M, C) to nodes (B, U, U, C)."""
        options = (self._k, self._convention, self._device, self._plain)
        gather = points_to_grid(*self._geometry, *options)
        return gather(h).unflatten(1, self._geometry[2])

    def leave(self, nodes: torch.Tensor) -> torch.Tensor:
        """Features at the nodes (B, U, U, C) to points (B, M, C)."""
        gather = grid_to_points(*self._geometry, self._convention, self._device, self._plain)
        return gather(nodes.flatten(1, 2))

    def enter_pieces(self, pieces: Iterable[tuple[Rectangle, torch.Tensor]]) -> torch.Tensor:
        """`enter` for a full lattice in pieces: windows that cover it, and features (B, points, C) in each."""
        points, batch, grid = self._geometry
        geometry = (points, 1, grid, self._k, self._convention, self._device)
        gather, read = points_to_grid(*geometry, self._plain), None
        ids = gather.rows  # (E,)
        rows, cols = ids.div(points.size[1], rounding_mode="floor"), ids.remainder(points.size[1])
        for window, h in pieces:
            read = h.new_empty(batch, len(ids), h.shape[2]) if read is None else read
            inside = (window.top <= rows) & (rows < window.bottom) & (window.left <= cols) & (cols < window.right)
            read[:, inside] = h[:, (rows[inside] - window.top) * window.size[1] + cols[inside] - window.left]
        places = torch.arange(len(ids), device=ids.device)
        gather = WeightedGather(1, places, gather.ends, gather.weights, self._plain).expand(batch, len(ids))
        return gather(read).unflatten(1, grid)

    def leave_at(self, nodes: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`leave` at some pixels of a full lattice, int64 (M,), alone."""
        points, batch, grid = self._geometry
        some = Points(points.size, ids.unsqueeze(0))
        gather = grid_to_points(some, batch, grid, self._convention, self._device, self._plain)
        return gather(nodes.flatten(1, 2))


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Stencils of a U-Net on nested subsets of points, one per level, finest first.

    same: within a level. down: to the next level; the last level keeps its points. up: to the level before; the first
    keeps its points.
    """

    same: Sequence[Stencil]
    down: Sequence[Stencil]
    up: Sequence[Stencil]

    def expand(self, batch: int) -> Pyramid:
        """The pyramid of one item for a batch of items with the same points."""
        parts = ([stencil.expand(batch) for stencil in part] for part in (self.same, self.down, self.up))
        return Pyramid(*parts)


class PointNodes:
    """Nested subsets of the points; level l holds min(M, side_l²) of them.

    The subset is a function of the set of points: the same lattice gives the same nodes in every step of a sampler, and
    other draws of points give others. Interpolation back to the points is over the nearest nodes.
    """

    def __init__(
        self,
        points: Points,
        batch: int,
        kind: str,
        sides: Sequence[int],
        k: int,
        convention: CoordinateConvention,
        device: torch.device,
        plain: bool = False,
    ) -> None:
        counts = tuple(min(points.count, side**2) for side in sides)
        if points.index is None:
            chosen, pyramid = _of_full_lattice(points.size, kind, tuple(sides), counts, convention, device)
        else:
            chosen, pyramid = _levels(points, kind, sides, counts, convention, device)
        self.pyramid = pyramid.expand(batch)
        self._chosen = chosen.expand(batch, -1)
        self._points, self._k, self._convention, self._plain = points, k, convention, plain
        self._nodes = Points(points.size, points.ids(device).gather(1, chosen))

    def enter(self, h: torch.Tensor) -> torch.Tensor:
        """Features at the points (B, M, C) to nodes (B, N, 1, C): those of the points chosen."""
        return h.gather(1, self._chosen.unsqueeze(2).expand(-1, -1, h.shape[2])).unsqueeze(2)

    def leave(self, nodes: torch.Tensor) -> torch.Tensor:
        """Features at the nodes (B, N, 1, C) to points (B, M, C): mean of the nearest by inverse squared distance."""
        nodes = nodes.squeeze(2)
        if self._nodes.count == self._points.count:
            return torch.empty_like(nodes).scatter(1, self._chosen.unsqueeze(2).expand_as(nodes), nodes)
        batch, size = len(nodes), self._points.size
        geometry = (self._nodes, batch, size, self._k, self._convention, nodes.device)
        gather = points_to_grid(*geometry, self._plain)
        return (gather if self._points.index is None else gather.some(self._points.index))(nodes)


@lru_cache(maxsize=4)
def _of_full_lattice(
    size: tuple[int, int],
    kind: str,
    sides: tuple[int, ...],
    counts: tuple[int, ...],
    convention: CoordinateConvention,
    device: torch.device,
) -> tuple[torch.Tensor, Pyramid]:
    return _levels(Points(size), kind, sides, counts, convention, device)


def _levels(
    points: Points,
    kind: str,
    sides: Sequence[int],
    counts: Sequence[int],
    convention: CoordinateConvention,
    device: torch.device,
) -> tuple[torch.Tensor, Pyramid]:
    """Positions of the nodes in the list of points, (B, N) or (1, N), and the stencils between the levels."""
    if kind not in SUBSETS:
        raise ValueError(f"model.downsampling is {kind!r}; accepted: {', '.join(SUBSETS)}")
    ids = points.ids(device)
    picks = max((count for count in counts if count < points.count), default=0)  # a level that takes all needs none
    order = _random_order(ids) if kind == "random" else _farthest_first(points, ids, picks)
    chosen = order[:, : counts[0]]
    levels = [Points(points.size, ids.gather(1, order[:, :count])) for count in counts]
    same = [stencil_between(level, level, side, convention) for level, side in zip(levels, sides)]
    down = [stencil_between(*pair, side, convention) for pair, side in zip(pairwise(levels), sides)]
    up = [stencil_between(*pair, side, convention) for pair, side in zip(zip(levels[1:], levels), sides[1:])]
    return chosen, Pyramid(same, [*down, same[-1]], [same[0], *up])


def _random_order(ids: torch.Tensor) -> torch.Tensor:
    """A permutation (B, M) of the points of each item that looks random and follows from the set of their ids."""
    salt = _scramble(ids).sum(1, keepdim=True)
    return _scramble(ids ^ salt).argsort(1)  # a bijection: no two keys are equal


def _scramble(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int64 that mixes all bits (the finaliser of SplitMix64; products wrap)."""
    x = (x ^ (x >> 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ (x >> 31)


def _farthest_first(points: Points, ids: torch.Tensor, picks: int) -> torch.Tensor:
    """Equidistant subsampling: a permutation (B, M) that begins with `picks` points, each farthest from those before.

    The lowest id comes first and decides ties. Distances are those in the unit square times H·W: exact integers.
    """
    size = points.size
    row = ids.div(size[1], rounding_mode="floor") * size[1]
    col = ids.remainder(size[1]) * size[0]
    nearest = torch.full_like(ids, _LAST)
    rank = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1) + picks  # the rest keep their order
    for pick in range(picks):
        candidates = ids.where(nearest == nearest.amax(1, keepdim=True), _LAST)
        chosen = candidates.argmin(1, keepdim=True)  # (B, 1)
        rank.scatter_(1, chosen, pick)
        distance = (row - row.gather(1, chosen)).square() + (col - col.gather(1, chosen)).square()
        nearest = torch.minimum(nearest, distance)
    return rank.argsort(1)
