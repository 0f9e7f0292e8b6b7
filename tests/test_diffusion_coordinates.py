"""Lattices, point subsets and coordinate conventions."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from diffusion.coordinates import (
    CONVENTIONS,
    Points,
    gather_points,
    image_to_points,
    points_to_image,
    scatter_points,
    validate_points,
)

SIZES = [(4, 4), (5, 7), (1, 6)]


def random_points(size, batch, count):
    return Points(size, torch.stack([torch.randperm(math.prod(size))[:count] for _ in range(batch)]))


@pytest.mark.parametrize("size", SIZES)
def test_gather_reads_the_pixel_named_by_the_id(size):
    x = torch.randn(2, 3, *size)
    points = random_points(size, 2, 4)
    values = gather_points(x, points)
    rows, cols = points.rows_cols()
    for b in range(2):
        for m in range(4):
            row, col = divmod(int(points.index[b, m]), size[1])
            assert (rows[b, m], cols[b, m]) == (row, col)
            assert torch.equal(values[b, m], x[b, :, row, col])


@pytest.mark.parametrize("size", SIZES)
def test_scatter_undoes_gather_and_fills_the_rest(size):
    x = torch.randn(2, 3, *size)
    points = random_points(size, 2, 4)
    image = scatter_points(gather_points(x, points), points)
    present = scatter_points(torch.ones(2, 4, 3), points).bool()
    assert torch.equal(image, torch.where(present, x, 0.0))
    assert present.sum() == 2 * 3 * 4


@pytest.mark.parametrize("size", SIZES)
def test_every_pixel(size):
    x = torch.randn(2, 3, *size)
    full = Points(size)
    listed = Points(size, torch.arange(math.prod(size)).repeat(2, 1))
    assert full.count == listed.count == math.prod(size) and full.is_full and not listed.is_full
    assert torch.equal(gather_points(x, full), gather_points(x, listed))
    assert torch.equal(scatter_points(image_to_points(x), full), x)
    assert torch.equal(points_to_image(image_to_points(x), size), x)
    assert torch.equal(torch.stack(full.rows_cols("cpu")), torch.stack(listed.rows_cols())[:, :1])


def test_conversions_of_every_pixel_copy_nothing():
    x = torch.randn(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = x.contiguous(memory_format=layout)
        assert image_to_points(laid_out).data_ptr() == laid_out.data_ptr()
    values = torch.randn(2, 20, 3)
    assert points_to_image(values, (4, 5)).is_contiguous(memory_format=torch.channels_last)


def test_gradients_reach_exactly_the_points_read():
    x = torch.randn(1, 2, 3, 5, requires_grad=True)
    points = random_points((3, 5), 1, 4)
    gather_points(x, points).sum().backward()
    assert torch.equal(x.grad, scatter_points(torch.ones(1, 4, 2), points))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (Points((0, 4)), "size"),
        (Points((2, 2), torch.zeros(1, 0, dtype=torch.int64)), "M > 0"),
        (Points((2, 2), torch.zeros(4, dtype=torch.int64)), r"\(B, M\)"),
        (Points((2, 2), torch.zeros(1, 1, dtype=torch.int32)), "int64"),
        (Points((2, 2), torch.tensor([[0, 4]])), "0 to 4"),
        (Points((2, 2), torch.tensor([[-1, 2]])), "-1 to 2"),
        (Points((2, 2), torch.tensor([[0, 1], [2, 2]])), "repeats"),
    ],
)
def test_malformed_points_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        validate_points(points)


def test_well_formed_points_are_accepted():
    for points in (
        Points((3, 5)),
        random_points((3, 5), 2, 15),
        Points((3, 5), torch.empty(0, 2, dtype=torch.int64)),
    ):
        validate_points(points)


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 5\)"):
        gather_points(torch.zeros(1, 1, 4, 5), Points((5, 4)))
    with pytest.raises(ValueError, match="3 points"):
        scatter_points(torch.zeros(1, 3, 1), Points((2, 2)))


@pytest.mark.parametrize("name", list(CONVENTIONS))
@pytest.mark.parametrize(("n", "u"), [(8, 4), (7, 4), (256, 128), (1, 3), (5, 1)])
def test_integer_geometry_is_the_coordinate_exactly(name, n, u):
    convention = CONVENTIONS[name]
    pixels, nodes, denominator = convention.integer_geometry(n, u)

    def coordinate(i, count):
        return Fraction(2 * i + 1, 2 * count) if name == "cell_centred" else Fraction(i, max(count - 1, 1))

    assert [Fraction(p, denominator) for p in pixels.tolist()] == [coordinate(i, n) for i in range(n)]
    assert [Fraction(p, denominator) for p in nodes.tolist()] == [coordinate(j, u) for j in range(u)]
    measured = convention.pixel_coordinate(torch.arange(n), n)
    torch.testing.assert_close(measured, pixels / denominator)


@pytest.mark.parametrize("name", ["cell_centred", "corner_aligned"])
def test_the_grid_is_read_at_the_coordinate(name):
    """A grid that holds a linear function of the coordinates returns that function, between the outermost nodes."""
    convention = CONVENTIONS[name]
    rows = convention.pixel_coordinate(torch.arange(6), 6)[:, None].expand(6, 9)
    cols = convention.pixel_coordinate(torch.arange(9), 9)[None, :].expand(6, 9)
    grid = (2 * rows + 5 * cols)[None, None]
    points = torch.rand(50, 2) * 0.7 + 0.15
    position = torch.stack(convention.grid_read_position(points[:, 0], points[:, 1]), dim=-1)[None, None]
    read = F.grid_sample(grid, position, align_corners=convention.align_corners, padding_mode=convention.padding_mode)
    torch.testing.assert_close(read.flatten(), 2 * points[:, 0] + 5 * points[:, 1])


def test_the_reference_reads_one_transposed_quadrant():
    """The published models read grid column (1 + r)·U/2 - 1/2 and grid row (1 + c)·U/2 - 1/2 at the point (r, c)."""
    convention, side = CONVENTIONS["reference"], 8
    i = torch.arange(side).float()
    grid = torch.stack([i[:, None].expand(side, side), i[None, :].expand(side, side)])[None]  # node row, node column
    r, c = torch.rand(2, 40) * 0.8
    position = torch.stack(convention.grid_read_position(r, c), dim=-1)[None, None]
    row, col = F.grid_sample(
        grid, position, align_corners=convention.align_corners, padding_mode=convention.padding_mode
    )[0, :, 0]
    torch.testing.assert_close(col, (1 + r) * side / 2 - 0.5)
    torch.testing.assert_close(row, (1 + c) * side / 2 - 0.5)
