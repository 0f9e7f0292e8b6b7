"""The look-up of nearest points in Triton, against brute force (on a CPU in its interpreter); compiled for an H100."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from diffusion.coordinates import CONVENTIONS, Points
from models import interpolation
from models.operators import dispatch
from models.operators.knn import search as knn
from models.operators.knn.pixel_order import geometry_of
from networks import random_index

triton_search = pytest.importorskip("models.operators.knn.triton_search")

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take(monkeypatch, module):
    """Have nearest points looked up by this module, or by PyTorch, on any device."""
    monkeypatch.setattr(dispatch, "kernels", lambda operation, *_: module if operation == "nearest points" else None)


def look_up(index, size, grid, k, length, convention):
    """By the kernel, and by the other look-up: ids, places, squared distances, shares and ends; on the CPU."""
    geometry = geometry_of(size, grid, convention, DEVICE)
    table = knn._columns(size, grid, length, convention, DEVICE)
    width = min(k - 1 + knn._MOST_TIED, index.shape[1]) if convention.shares_ties else k
    found = triton_search.nearest_present(index.to(DEVICE), *table, geometry.axes, geometry.denominator, k, width)
    geometry = geometry_of(size, grid, convention, CPU)
    nodes = torch.arange(len(index) * grid[0] * grid[1])
    before, counts, entries = knn.search(nodes, index, k, width, geometry)
    expected = knn._assembled(before, counts, k, entries)
    image = (nodes // (grid[0] * grid[1])).repeat_interleave(counts)
    places = (index[image] == expected.pixels[:, None]).int().argmax(1)
    ids, there, squared, shares = (part.cpu().flatten(0, 1) for part in found)
    taken = torch.arange(width) < counts[:, None]
    assert torch.equal(shares > 0, taken)  # what is left is padding, which repeats the nearest
    for part in (ids, there, squared):
        assert torch.equal(part.where(~taken, part[:, :1]), part[:, :1].expand_as(part))
    found = [part[taken] for part in (ids, there, squared, shares)]
    return found, (expected.pixels, places, expected.squared, expected.shares)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(
    ("size", "grid", "count", "k", "length"),
    [
        ((8, 8), (4, 4), 20, 3, 16),
        ((7, 5), (4, 6), 9, 5, 35),
        ((5, 9), (8, 8), 45, 3, 5),  # every pixel present; length is no multiple of the steps
        ((1, 6), (2, 2), 3, 3, 6),  # no more points than a node reads
        ((3, 3), (5, 7), 3, 3, 4),
        ((16, 12), (6, 5), 20, 3, 8),  # most tables run out
        ((20, 15), (3, 3), 270, 3, 0),  # no table; more points than are searched at a time
        ((32, 32), (8, 8), 256, 3, 64),
        ((16, 16), (8, 8), 128, 3, 32),  # many ties
        ((12, 9), (4, 3), 80, 5, 16),  # ties that end beyond the table
    ],
)
def test_equals_brute_force(name, size, grid, count, k, length):
    found, expected = look_up(random_index(2, size, count), size, grid, k, length, CONVENTIONS[name])
    for one, other in zip(found, expected):
        assert torch.equal(one, other) or (DEVICE.type == "cuda" and one is found[2])  # a GPU may fuse the squares
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=0)


def test_starved_nodes_are_searched_for():
    index = torch.arange(64).flip(0).unsqueeze(0)  # the upper quarter alone: nodes below are far from all points
    found, expected = look_up(index, (16, 16), (8, 8), 3, 32, CONVENTIONS["cell_centred"])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[3], expected[3])


@pytest.mark.parametrize("name", ["cell_centred", "reference"])
@pytest.mark.parametrize("count", [3, 12, 80])
def test_takes_the_place_of_the_other_look_up(name, count, monkeypatch):
    points = Points((16, 10), random_index(2, (16, 10), count).to(DEVICE))
    arguments = (points, (8, 5), 3, CONVENTIONS[name], DEVICE)
    x = torch.randn(2, count, 6, device=DEVICE, requires_grad=True)
    results = []
    for kernels in (None, triton_search):
        take(monkeypatch, kernels)
        grid = interpolation.interpolate_to_grid(x, *arguments[:-1])
        dx = torch.autograd.grad(grid.square().sum(), x)[0]
        found = [knn.nearest_points(*arguments), knn.nearest_rows(*arguments)]
        results.append([grid, dx, *(part[nearest.shares > 0] for nearest in found for part in nearest[:3])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_is_opaque_to_the_compiler():
    geometry = geometry_of((6, 6), (3, 3), CONVENTIONS["cell_centred"], DEVICE)
    table = knn._columns((6, 6), (3, 3), 16, CONVENTIONS["cell_centred"], DEVICE)
    arguments = (random_index(2, (6, 6), 9).to(DEVICE), *table, geometry.axes, geometry.denominator, 3, 7)
    torch.library.opcheck(torch.ops.infty_diff.nearest_present.default, arguments)


def test_nothing_is_read_back(monkeypatch):
    """Tensors without values refuse to be read."""
    take(monkeypatch, triton_search)
    size, grid, convention = (16, 10), (5, 4), CONVENTIONS["cell_centred"]
    arguments = (2, grid, 3, convention, CPU)
    geometry_of(size, grid, convention, CPU)
    knn._most_tied(size, grid, 64, convention)
    knn._columns(size, grid, 128, convention, CPU)  # all are kept from then on
    with FakeTensorMode(allow_non_fake_inputs=True):
        points = Points(size, torch.zeros(2, 40, dtype=torch.int64))
        out = interpolation.points_to_grid(points, *arguments)(torch.zeros(2, 40, 6))
        back = interpolation.grid_to_points(points, 2, grid, convention, CPU)(out)
    assert out.shape == (2, 20, 6) and back.shape == (2, 40, 6)


def test_compiles_for_an_h100(tmp_path):
    from triton_aot import compiled

    kernels = compiled(
        """
import torch
from models.operators.knn.triton_search import nearest_present
axes = [torch.empty(n, dtype=torch.int64) for n in (64, 64, 32, 32)]
index, table = torch.zeros(2, 1024, dtype=torch.int64), torch.empty(64, 1024, dtype=torch.int32)
nearest_present(index, table, table, axes, 128, 3, 14)
""",
        tmp_path,
    )
    assert [kernel.name for kernel in kernels] == ["nearest_kernel"]
    assert all(kernel.fits() for kernel in kernels), kernels
