"""Nearest points and transposed gathers in C: bit for bit as in PyTorch, which other tests hold to exact fractions."""

import pytest
import torch

from diffusion.coordinates import CONVENTIONS, Points
from models.interpolation import _transposed, grid_to_points, points_to_grid
from models.operators import compiled
from models.operators.knn import cpu_search
from models.operators.knn import search as knn
from models.operators.knn.pixel_order import geometry_of, ordered_pixels
from models.operators.knn.search import nearest_points, nearest_rows
from networks import random_index

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
CASES = [
    ((8, 8), (4, 4), 30, 3),  # an even ratio: many ties
    ((12, 18), (4, 6), 60, 3),  # an odd ratio
    ((9, 6), (3, 3), 40, 3),
    ((10, 6), (7, 5), 30, 4),
    ((16, 12), (8, 4), 192, 5),  # all pixels, in any order
    ((4, 6), (2, 2), 5, 5),  # no more points than a node reads, whose table holds all pixels
    ((32, 32), (16, 16), 256, 3),
    ((6, 6), (6, 6), 20, 1),
]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def answers(monkeypatch):
    """Whether C gave an answer, call by call."""
    told, ask = [], cpu_search.first_present

    def spy(*arguments):
        found = ask(*arguments)
        told.append(found is not None)
        return found

    monkeypatch.setattr(cpu_search, "first_present", spy)
    return told


def assert_same(arguments):
    for look_up in (nearest_points, nearest_rows):
        for one, other in zip(look_up(*arguments), look_up(*arguments, plain=True), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("size", "grid", "count", "k"), CASES)
def test_same_bits_as_in_pytorch(name, size, grid, count, k, threads, answers):
    index = random_index(3, size, count, seed=7)
    assert_same((Points(size, index), grid, k, CONVENTIONS[name], CPU))
    strided = torch.stack([index, index.flip(1)], 2)[..., 1]
    assert_same((Points(size, strided), grid, k, CONVENTIONS[name], CPU))
    assert answers == [True] * 4


@needs_compiler
@pytest.mark.parametrize("k", [1, 3, 4])
def test_more_tied_points_than_are_taken(k):
    size, grid, convention = (16, 16), (4, 4), CONVENTIONS["cell_centred"]
    index, table = random_index(2, size, 200), ordered_pixels(size, grid, 64, convention, CPU)
    for width in (k, k + 1, k + 2):
        *found, _ = cpu_search.first_present(index, size, table, k, width)
        geometry = geometry_of(size, grid, convention, CPU)
        expected = knn._first_present(index, table, k, width, 256, geometry)
        assert expected.ends.diff().max() == width
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@needs_compiler
def test_where_the_table_does_not_tell_pytorch_takes_over(answers):
    size, convention = (32, 32), CONVENTIONS["cell_centred"]
    rows = torch.arange(256).repeat(2, 1)  # the upper quarter alone: nodes below are far from all points
    rows[0] = random_index(1, size, 256)
    assert_same((Points(size, rows), (8, 8), 3, convention, CPU))
    assert answers == [False] * 2
    index, table = random_index(1, (12, 9), 80), ordered_pixels((12, 9), (4, 3), 7, convention, CPU)
    assert bool((table.ends > 7).any())  # ties that end beyond the table
    assert cpu_search.first_present(index, (12, 9), table, 6, 20) is None


@needs_compiler
def test_memory_is_safe_from_wrong_ids():
    convention = CONVENTIONS["cell_centred"]
    for wrong in (16, -1, 2**40):
        points = Points((4, 4), torch.tensor([[0, 1, 2, 3, 8, 9, 10, wrong]]))
        for plain in (False, True):
            with pytest.raises((RuntimeError, IndexError)):
                nearest_points(points, (2, 2), 3, convention, CPU, plain)
    assert_same((Points((4, 4), torch.arange(16)[None, [0, 0, *range(1, 14)]]), (2, 2), 3, convention, CPU))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("entries", "sources"), [(0, 4), (1, 1), (40, 7), (500, 2000), (5000, 90)])
def test_transposition_is_a_stable_sort(dtype, entries, sources, threads):
    used = torch.randperm(sources)[: max(sources // 2, 1)]  # others have no reader
    rows = used[torch.randint(len(used), (entries,))].to(dtype)
    order, begins = _transposed(rows, sources, plain=False)
    assert order.tolist() == sorted(range(entries), key=rows.tolist().__getitem__)  # Python's sort is stable
    assert begins.diff().tolist() == rows.bincount(minlength=sources).tolist() and begins[0] == 0
    for one, other in zip((order, begins), _transposed(rows, sources, plain=True), strict=True):
        assert one.dtype == other.dtype == torch.int64 and torch.equal(one, other)


@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("subset", [True, False])
def test_interpolations_and_their_gradients_have_the_same_bits(subset, compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr(compiled, "library", lambda: None)
    size, grid, batch = (12, 16), (6, 4), 2
    points = Points(size, random_index(batch, size, 60) if subset else None)
    results = []
    for plain in (False, True):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, points.count, 5, generator=generator, requires_grad=True)
        nodes = points_to_grid(points, batch, grid, 3, CONVENTIONS["cell_centred"], CPU, plain)(x)
        back = grid_to_points(points, batch, grid, CONVENTIONS["cell_centred"], CPU, plain)(nodes.sin())
        results.append((nodes, back, *torch.autograd.grad(back.square().sum(), x)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
