"""Nearest present pixels, against rational brute force written out here, and against scipy's k-d tree."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from scipy.spatial import cKDTree

from diffusion.coordinates import CONVENTIONS, Points
from models.interpolation import points_to_grid
from models.operators.knn import search as knn
from models.operators.knn.pixel_order import geometry_of
from models.operators.knn.search import Nearest, nearest_points
from networks import random_index

CPU = torch.device("cpu")


def coordinate(name: str, i: int, n: int) -> Fraction:
    return Fraction(2 * i + 1, 2 * n) if name == "cell_centred" else Fraction(i, max(n - 1, 1))


def by_fractions(name: str, ids: list[int], size: tuple[int, int], grid: tuple[int, int], k: int) -> list[list]:
    """(pixel id, share) of each node: exact rational distances, Python's own sort, ties by pixel id."""
    pixels = [(coordinate(name, i // size[1], size[0]), coordinate(name, i % size[1], size[1]), i) for i in ids]
    rows = []
    for j in range(grid[0] * grid[1]):
        r, c = coordinate(name, j // grid[1], grid[0]), coordinate(name, j % grid[1], grid[1])
        ordered = sorted(((a - r) ** 2 + (b - c) ** 2, i) for a, b, i in pixels)
        farthest = ordered[k - 1][0]
        tied = [i for distance, i in ordered if distance == farthest]
        before = [i for distance, i in ordered if distance < farthest]
        if name != "cell_centred":
            rows.append([(i, 1) for _, i in ordered[:k]])
        else:
            rows.append([(i, 1) for i in before] + [(i, Fraction(k - len(before), len(tied))) for i in tied])
    return rows


def as_rows(found: Nearest) -> list[list]:
    """The same of what was found; rational numbers of float32 with denominators below 100 are recovered exactly."""
    ends = found.ends.tolist()
    shares = [Fraction(share).limit_denominator(99) for share in found.shares.tolist()]
    entries = list(zip(found.pixels.tolist(), shares))
    return [[entry for entry in entries[a:b] if entry[1]] for a, b in pairwise(ends)]


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(
    ("size", "grid", "count", "k"),
    [
        ((8, 8), (4, 4), 20, 3),
        ((8, 8), (4, 4), 50, 3),  # many ties
        ((9, 6), (3, 3), 40, 3),  # a pixel on every node, ties around it along one axis
        ((12, 12), (3, 3), 70, 6),
        ((7, 5), (4, 6), 9, 5),
        ((5, 9), (8, 8), 45, 3),
        ((1, 6), (2, 2), 3, 3),  # no more points than a node reads
        ((6, 6), (6, 6), 36, 4),
        ((24, 24), (3, 3), 12, 3),  # tables run out
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_order_and_shares_are_those_of_exact_fractions(name, size, grid, count, k, plain):
    index = random_index(2, size, count)
    found = nearest_points(Points(size, index), grid, k, CONVENTIONS[name], CPU, plain)
    expected = [row for ids in index.tolist() for row in by_fractions(name, ids, size, grid, k)]
    assert as_rows(found) == expected
    for a, b in pairwise(found.ends.tolist()):
        assert bool((found.squared[a:b].diff() >= -1e-7).all())
        assert found.shares[a:b].sum().item() == pytest.approx(k, abs=1e-6)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 4)), ((7, 5), (4, 6)), ((3, 3), (12, 12)), ((16, 10), (3, 3))])
def test_full_lattice_is_the_subset_of_all_pixels(name, size, grid):
    everything = torch.randperm(size[0] * size[1]).unsqueeze(0)
    full = nearest_points(Points(size), grid, 3, CONVENTIONS[name], CPU)
    listed = nearest_points(Points(size, everything), grid, 3, CONVENTIONS[name], CPU)
    assert all(torch.equal(one, other) for one, other in zip(full, listed))
    assert as_rows(full) == by_fractions(name, range(size[0] * size[1]), size, grid, 3)


RATIOS = [((8, 8), (4, 4)), ((16, 16), (4, 4)), ((12, 12), (4, 4)), ((20, 12), (4, 4)), ((8, 24), (4, 8)),
          ((12, 8), (4, 4)), ((6, 6), (6, 6)), ((12, 10), (8, 4))]  # fmt: skip


@pytest.mark.parametrize(("size", "grid"), RATIOS)
def test_no_pixel_is_left_out_by_its_number(size, grid):
    """Mirrored, the lattice has the same nearest pixels: nothing depends on how pixels are numbered."""
    pixels = torch.arange(size[0] * size[1]).view(size)
    found = nearest_points(Points(size), grid, 3, CONVENTIONS["cell_centred"], CPU)
    weights = torch.zeros(grid[0] * grid[1], size[0] * size[1])
    node = torch.arange(len(weights)).repeat_interleave(found.ends.diff())
    weights[node, found.pixels] = found.shares
    for axes in ((0,), (1,), (0, 1)):
        turned = weights.view(*grid, -1).flip(axes).flatten(0, 1)[:, pixels.flip(axes).flatten()]
        torch.testing.assert_close(turned, weights)


@pytest.mark.parametrize(("size", "grid"), RATIOS[:-1])  # at whole ratios
@pytest.mark.parametrize("k", [3, 4])
def test_nodes_sit_in_the_middle_of_what_they_read(size, grid, k):
    """Even and odd ratios, square cells and not: the centroid of what a node reads is the node, in units of a pixel."""
    convention, points = CONVENTIONS["cell_centred"], Points(size)
    gather = points_to_grid(points, 1, grid, k, convention, CPU)
    rows, cols = (axis[0, gather.rows] for axis in points.rows_cols())
    node = torch.arange(grid[0] * grid[1]).repeat_interleave(gather.ends.diff())
    for axis, place, number in ((0, rows, node // grid[1]), (1, cols, node % grid[1])):
        offset = place + 0.5 - (number + 0.5) * size[axis] / grid[axis]
        off_centre = torch.zeros(len(gather.ends) - 1).index_add(0, node, gather.weights * offset)
        assert off_centre.abs().max() < 1e-6
    sums = torch.zeros(len(off_centre)).index_add(0, node, gather.weights)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_at_an_even_ratio_every_pixel_around_a_node_is_read():
    for size, grid, read in (((16, 16), (8, 8), 256), ((32, 32), (8, 8), 256), ((16, 32), (8, 16), 512)):
        found = nearest_points(Points(size), grid, 3, CONVENTIONS["cell_centred"], CPU)
        assert len(found.pixels.unique()) == read
        assert torch.equal(found.shares, torch.full((read,), 0.75))


@pytest.mark.parametrize("count", [5, 16, 64, 250, 1500, 3071])
@pytest.mark.parametrize("plain", [False, True])
def test_table_agrees_with_search(count, plain):
    size, grid, convention = (64, 48), (16, 16), CONVENTIONS["cell_centred"]
    index = random_index(2, size, count)
    assert_searched(index, size, grid, nearest_points(Points(size, index), grid, 3, convention, CPU, plain))


def test_nodes_whose_table_runs_out_are_searched():
    size, grid, convention = (32, 32), (8, 8), CONVENTIONS["cell_centred"]
    index = torch.arange(256).unsqueeze(0)  # the upper quarter alone: nodes below are far from all points
    assert_searched(index, size, grid, nearest_points(Points(size, index), grid, 3, convention, CPU))


def assert_searched(index, size, grid, found):
    geometry = geometry_of(size, grid, CONVENTIONS["cell_centred"], CPU)
    nodes = torch.arange(len(index) * grid[0] * grid[1])
    before, counts, entries = knn.search(nodes, index, 3, 3 - 1 + knn._MOST_TIED, geometry)
    assert torch.equal(found.ends.diff(), counts)
    assert torch.equal(found.pixels, entries.ids)
    assert all(torch.equal(a, b) for a, b in zip(found, knn._assembled(before, counts, 3, entries)))


def test_more_tied_points_than_can_be_are_bounded():
    """A ring of 24 pixels around a node and nothing inside: the first 16 by their ids share, as for more than W."""
    size, grid, convention = (64, 64), (1, 1), CONVENTIONS["cell_centred"]
    offset = 2 * torch.arange(64) - 63
    distance = offset[:, None].square() + offset.square()
    index = (distance == 650).flatten().nonzero().T  # (5, 25), (11, 23), (17, 19) in all signs and orders
    assert index.shape[1] == 24
    found = nearest_points(Points(size, index), grid, 3, convention, CPU)
    assert len(found.pixels) == 18 and torch.equal(found.pixels, index[0, :18])
    torch.testing.assert_close(found.shares, torch.full((18,), 3 / 18))


@pytest.mark.parametrize(("size", "grid"), [((128, 128), (64, 64)), ((96, 160), (64, 32))])
def test_distances_are_those_of_a_k_d_tree(size, grid):
    convention = CONVENTIONS["cell_centred"]
    points = Points(size, random_index(2, size, size[0] * size[1] // 4))
    found = nearest_points(points, grid, 3, convention, CPU)
    squared = found.squared[found.ends[:-1, None] + torch.arange(3)].unflatten(0, (2, -1))
    rows, cols = points.rows_cols()
    where = torch.stack([convention.pixel_coordinate(rows, size[0]), convention.pixel_coordinate(cols, size[1])], 2)
    axes = [convention.pixel_coordinate(torch.arange(n), n) for n in grid]
    nodes = torch.cartesian_prod(*axes)
    for ours, positions in zip(squared, where):
        distance, _ = cKDTree(positions.double().numpy()).query(nodes.double().numpy(), k=3)
        torch.testing.assert_close(ours.double().sqrt(), torch.from_numpy(distance), rtol=1e-5, atol=1e-7)


def test_order_of_the_points_does_not_matter():
    size, grid = (16, 16), (8, 8)
    index = random_index(1, size, 60)
    shuffled = index[:, torch.randperm(60)]
    args = (grid, 3, CONVENTIONS["cell_centred"], CPU)
    assert torch.equal(nearest_points(Points(size, index), *args)[0], nearest_points(Points(size, shuffled), *args)[0])


def test_fewer_points_than_a_node_reads_are_an_error():
    with pytest.raises(ValueError, match="knn_neighbours is 3; accepted: 1 to 2, the number of points"):
        nearest_points(Points((4, 4), torch.tensor([[0, 1]])), (2, 2), 3, CONVENTIONS["cell_centred"], CPU)
    with pytest.raises(ValueError, match="accepted: 1 to 1"):
        nearest_points(Points((1, 1)), (2, 2), 3, CONVENTIONS["cell_centred"], CPU)


def test_incommensurable_lattices():
    """The full lattice never needs distances across it; a search does, and refuses where they would overflow."""
    size, convention = (4093, 4095), CONVENTIONS["cell_centred"]
    found = nearest_points(Points(size), (128, 128), 3, convention, CPU)
    assert len(found.ends) == 128 * 128 + 1 and found.shares.sum() == 3 * 128 * 128
    with pytest.raises(ValueError, match="4093x4095"):
        nearest_points(Points(size, torch.arange(3).unsqueeze(0)), (128, 128), 3, convention, CPU)
