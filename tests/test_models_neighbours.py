"""Nearest present pixels, against integer brute force written out here, and against scipy's k-d tree."""

from fractions import Fraction

import pytest
import torch
from scipy.spatial import cKDTree

from diffusion.coordinates import CONVENTIONS, Points
from models import neighbours
from models.neighbours import nearest_points

CPU = torch.device("cpu")


def random_index(batch: int, size: tuple[int, int], count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size[0] * size[1], generator=generator)[:count] for _ in range(batch)])


def coordinate(name: str, i: int, n: int) -> Fraction:
    return Fraction(2 * i + 1, 2 * n) if name == "cell_centred" else Fraction(i, max(n - 1, 1))


def sorted_by_fractions(name: str, ids: list[int], size: tuple[int, int], grid: tuple[int, int], k: int) -> list[list]:
    """Exact rational distances, Python's own sort, ties by pixel id."""
    pixels = [(coordinate(name, i // size[1], size[0]), coordinate(name, i % size[1], size[1]), i) for i in ids]
    rows = []
    for j in range(grid[0] * grid[1]):
        r, c = coordinate(name, j // grid[1], grid[0]), coordinate(name, j % grid[1], grid[1])
        rows.append([i for _, i in sorted(((a - r) ** 2 + (b - c) ** 2, i) for a, b, i in pixels)[:k]])
    return rows


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(
    ("size", "grid", "count", "k"),
    [
        ((8, 8), (4, 4), 20, 3),
        ((7, 5), (4, 6), 9, 5),
        ((5, 9), (8, 8), 45, 3),
        ((1, 6), (2, 2), 3, 3),
        ((6, 6), (6, 6), 36, 4),
    ],
)
def test_order_is_that_of_exact_fractions(name, size, grid, count, k):
    index = random_index(2, size, count)
    ids, squared = nearest_points(Points(size, index), grid, k, CONVENTIONS[name], CPU)
    for row, found in zip(index.tolist(), ids.tolist()):
        assert found == sorted_by_fractions(name, row, size, grid, k)
    assert bool((squared.diff(dim=2) >= 0).all())


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 4)), ((7, 5), (4, 6)), ((3, 3), (12, 12)), ((16, 10), (3, 3))])
def test_full_lattice_is_the_subset_of_all_pixels(name, size, grid):
    everything = torch.randperm(size[0] * size[1]).unsqueeze(0)
    full = nearest_points(Points(size), grid, 3, CONVENTIONS[name], CPU)
    listed = nearest_points(Points(size, everything), grid, 3, CONVENTIONS[name], CPU)
    assert torch.equal(full[0], listed[0])
    assert torch.equal(full[1], listed[1])
    assert full[0][0].tolist() == sorted_by_fractions(name, range(size[0] * size[1]), size, grid, 3)


@pytest.mark.parametrize("count", [5, 16, 64, 250, 1500, 3071])
def test_table_agrees_with_search(count):
    size, grid, convention = (64, 48), (16, 16), CONVENTIONS["cell_centred"]
    index = random_index(2, size, count)
    geometry = neighbours._geometry(size, grid, convention, CPU)
    expected = neighbours._search_all(index, grid, 3, geometry)
    assert torch.equal(nearest_points(Points(size, index), grid, 3, convention, CPU)[0], expected)


def test_nodes_whose_table_runs_out_are_searched():
    size, grid, convention = (32, 32), (8, 8), CONVENTIONS["cell_centred"]
    index = torch.arange(256).unsqueeze(0)  # the upper quarter alone: nodes below are far from all points
    geometry = neighbours._geometry(size, grid, convention, CPU)
    expected = neighbours._search_all(index, grid, 3, geometry)
    assert torch.equal(nearest_points(Points(size, index), grid, 3, convention, CPU)[0], expected)


@pytest.mark.parametrize(("size", "grid"), [((128, 128), (64, 64)), ((96, 160), (64, 32))])
def test_distances_are_those_of_a_k_d_tree(size, grid):
    convention = CONVENTIONS["cell_centred"]
    points = Points(size, random_index(2, size, size[0] * size[1] // 4))
    _, squared = nearest_points(points, grid, 3, convention, CPU)
    rows, cols = points.rows_cols()
    where = torch.stack([convention.pixel_coordinate(rows, size[0]), convention.pixel_coordinate(cols, size[1])], 2)
    axes = [convention.pixel_coordinate(torch.arange(n), n) for n in grid]
    nodes = torch.cartesian_prod(*axes)
    for found, positions in zip(squared, where):
        distance, _ = cKDTree(positions.double().numpy()).query(nodes.double().numpy(), k=3)
        torch.testing.assert_close(found.double().sqrt(), torch.from_numpy(distance), rtol=1e-5, atol=1e-7)


def test_order_of_the_points_does_not_matter():
    size, grid = (16, 16), (8, 8)
    index = random_index(1, size, 60)
    shuffled = index[:, torch.randperm(60)]
    args = (grid, 3, CONVENTIONS["cell_centred"], CPU)
    assert torch.equal(nearest_points(Points(size, index), *args)[0], nearest_points(Points(size, shuffled), *args)[0])


def test_fewer_points_than_neighbours_is_an_error():
    with pytest.raises(ValueError, match=r"2 points.*knn_neighbours=3"):
        nearest_points(Points((4, 4), torch.tensor([[0, 1]])), (2, 2), 3, CONVENTIONS["cell_centred"], CPU)
    with pytest.raises(ValueError, match="1 points"):
        nearest_points(Points((1, 1)), (2, 2), 3, CONVENTIONS["cell_centred"], CPU)


def test_incommensurable_lattices():
    """The full lattice never needs distances across it; a search does, and refuses where they would overflow."""
    size, convention = (4093, 4095), CONVENTIONS["cell_centred"]
    ids, _ = nearest_points(Points(size), (128, 128), 3, convention, CPU)
    assert ids.shape == (1, 128 * 128, 3)
    with pytest.raises(ValueError, match="4093x4095"):
        nearest_points(Points(size, torch.arange(3).unsqueeze(0)), (128, 128), 3, convention, CPU)
