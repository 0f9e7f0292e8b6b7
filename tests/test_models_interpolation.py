"""Both interpolations, against their formulas written out and against `grid_sample`."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.coordinates import CONVENTIONS, Points
from models.interpolation import grid_to_points, interpolate_to_grid, points_to_grid

CPU = torch.device("cpu")


def some_points(size, count, batch=2):
    return Points(size, torch.stack([torch.randperm(size[0] * size[1])[:count] for _ in range(batch)]))


def coordinates(points, convention, dtype=torch.float32):
    rows, cols = (axis.to(dtype) for axis in points.rows_cols())
    height, width = points.size
    return torch.stack([convention.pixel_coordinate(rows, height), convention.pixel_coordinate(cols, width)], dim=2)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("size", "grid", "count", "k"), [((9, 7), (4, 6), 30, 3), ((5, 5), (8, 8), 6, 5)])
def test_points_to_grid_is_the_inverse_square_mean(name, size, grid, count, k):
    torch.manual_seed(0)
    convention, points, x = CONVENTIONS[name], some_points(size, count), torch.randn(2, count, 4)
    nodes = torch.cartesian_prod(*(convention.pixel_coordinate(torch.arange(n).double(), n) for n in grid))
    where = coordinates(points, convention, torch.float64)
    squared = (nodes[None, :, None] - where[:, None]).square().sum(3)  # (B, Q, M)
    distance = squared.round(decimals=10)
    if not convention.shares_ties:
        distance += 1e-13 * points.index[:, None]
    farthest = distance.kthvalue(k, dim=2, keepdim=True).values
    before, tied = (distance < farthest).double(), (distance == farthest).double()
    shares = before + tied * (k - before.sum(2, keepdim=True)) / tied.sum(2, keepdim=True)
    weights = shares / squared.clamp(min=1e-16)  # (B, Q, M)
    expected = weights @ x.double() / weights.sum(2, keepdim=True)
    ours = points_to_grid(points, 2, grid, k, convention, CPU)(x)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_point_on_a_node_counts_alone():
    points, convention = Points((4, 4)), CONVENTIONS["cell_centred"]
    x = torch.randn(2, 16, 3)
    torch.testing.assert_close(points_to_grid(points, 2, (4, 4), 3, convention, CPU)(x), x)
    torch.testing.assert_close(grid_to_points(points, 2, (4, 4), convention, CPU)(x), x)


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("size", "grid"), [((9, 7), (4, 6)), ((3, 5), (8, 8)), ((1, 1), (2, 3)), ((16, 16), (1, 1))])
def test_grid_to_points_is_grid_sample(name, size, grid):
    torch.manual_seed(0)
    convention = CONVENTIONS[name]
    for points in (Points(size), some_points(size, size[0] * size[1])):
        rows, cols = coordinates(points, convention).unbind(2)
        where = torch.stack(convention.grid_read_position(rows, cols), dim=2).expand(2, -1, -1).unsqueeze(2)
        image = torch.randn(2, 3, *grid)
        expected = F.grid_sample(
            image, where, padding_mode=convention.padding_mode, align_corners=convention.align_corners
        )
        ours = grid_to_points(points, 2, grid, convention, CPU)(image.flatten(2).transpose(1, 2))
        torch.testing.assert_close(ours, expected.squeeze(3).transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cell_centred", "corner_aligned"])
def test_linear_functions_come_back_from_the_grid(name):
    """Positions mean the same on grid and lattice: away from the border a linear function is read exactly."""
    convention, size, grid = CONVENTIONS[name], (24, 40), (8, 6)
    nodes = torch.cartesian_prod(*(convention.pixel_coordinate(torch.arange(n), n) for n in grid))
    coords = coordinates(Points(size), convention)[0]
    read = grid_to_points(Points(size), 1, grid, convention, CPU)(nodes.unsqueeze(0))[0]
    inner = ((coords > 0.1) & (coords < 0.9)).all(1)
    torch.testing.assert_close(read[inner], coords[inner], rtol=0, atol=1e-5)


def test_gradients_and_precision():
    torch.manual_seed(0)
    points, convention = some_points((6, 5), 11), CONVENTIONS["cell_centred"]
    gather = points_to_grid(points, 2, (3, 4), 3, convention, CPU)
    scatter = grid_to_points(points, 2, (3, 4), convention, CPU)
    x = torch.randn(2, 11, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scatter(gather(x)), x)
    half = gather(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), gather(x.detach().bfloat16().float()), rtol=1e-2, atol=1e-3)


def test_interpolation_to_an_image():
    points, x = some_points((8, 8), 20), torch.randn(2, 20, 3)
    convention = CONVENTIONS["cell_centred"]
    image = interpolate_to_grid(x, points, (4, 6), 3, convention)
    expected = points_to_grid(points, 2, (4, 6), 3, convention, CPU)(x)
    assert image.shape == (2, 3, 4, 6)
    torch.testing.assert_close(image[:, :, 1, 2], expected[:, 1 * 6 + 2])
