"""Kernels at other lattices than that of training, resampled by overlap of cells: against fractions and loops."""

from fractions import Fraction

import pytest
import torch

from diffusion.coordinates import CONVENTIONS, Points, points_to_image
from models.continuous_kernel import ContinuousKernel
from models.operators.dispatch import AUTOMATIC, get_backend
from models.operators.sparse_conv.backend import (
    cell_overlaps,
    coverage,
    covered_area,
    inverse_density,
    kernel_window,
    resample_kernel,
    resampled_shape,
)
from models.sparse_block import SparseBlock
from networks import random_points

CPU = torch.device("cpu")
CONVENTION = CONVENTIONS["cell_centred"]
# Lattice, training lattice, k: coarser and finer, whole ratios and others, one axis, more than a pixel's whole kernel.
CASES = [
    ((32, 32), (16, 16), 7),
    ((20, 24), (16, 16), 5),
    ((48, 17), (16, 16), 3),
    ((11, 40), (16, 16), 5),
    ((8, 8), (16, 16), 7),
    ((5, 7), (16, 16), 3),
    ((15, 16), (16, 16), 7),
    ((36, 20), (12, 20), 5),
]


def overlap(k: int, n: int, train_n: int, t: int, i: int) -> Fraction:
    """Part of pixel t, counted from the middle, of a lattice of n that cell i of k of a lattice of train_n covers."""
    r = Fraction(n, train_n)
    low, high = (i - Fraction(k, 2)) * r, (i + 1 - Fraction(k, 2)) * r
    half = Fraction(1, 2)
    return max(Fraction(0), min(high, t + half) - max(low, t - half))


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("n", [16, 32, 24, 17, 15, 8, 3, 43])
def test_overlaps_are_those_of_exact_fractions(n, k):
    train_n = 16
    kernel_shape, span = kernel_window(k, (n, 17), (train_n, train_n), CONVENTION)
    reach = kernel_shape[0] // 2
    exact = [[float(overlap(k, n, train_n, t, i)) for t in range(-reach, reach + 1)] for i in range(k)]
    torch.testing.assert_close(
        cell_overlaps(k, kernel_shape[0], span[0], CPU), torch.tensor(exact, dtype=torch.float64)
    )
    assert all(overlap(k, n, train_n, reach + 1, i) == 0 for i in range(k))  # nothing is left out,
    assert reach == 0 or any(overlap(k, n, train_n, reach, i) for i in range(k))  # and nothing taken in vain


def test_windows_follow_the_convention_and_each_axis():
    assert kernel_window(7, (64, 32), (32, 32), CONVENTION) == ((15, 7), (14.0, 7.0))
    assert kernel_window(7, (16, 48), (32, 32), CONVENTION) == ((5, 11), (3.5, 10.5))
    assert kernel_window(3, (96, 8), (32, 32), CONVENTION) == ((9, 1), (9.0, 0.75))
    assert kernel_window(7, (32, 32), (32, 32), CONVENTION) == ((7, 7), None)
    for name in ("reference", "corner_aligned"):
        assert kernel_window(7, (64, 16), (32, 32), CONVENTIONS[name]) == ((13, 3), None)


@pytest.mark.parametrize(("size", "train_size", "k"), CASES)
def test_area_is_the_sum_of_what_is_covered(size, train_size, k):
    torch.manual_seed(0)
    kernel_shape, span = kernel_window(k, size, train_size, CONVENTION)
    parts = [
        {t: float(sum(overlap(k, n, train_n, t, i) for i in range(k))) for t in range(-(side // 2), side // 2 + 1)}
        for n, train_n, side in zip(size, train_size, kernel_shape)
    ]
    for points in (Points(size), random_points(2, size, max(size[0] * size[1] // 5, 1))):
        found = covered_area(points, kernel_shape, span, CPU)
        for ids, row in zip(points.ids().tolist(), found.tolist()):
            where = [divmod(i, size[1]) for i in ids]
            for (r, c), area in list(zip(where, row))[:40]:
                expected = sum(parts[0].get(y - r, 0) * parts[1].get(x - c, 0) for y, x in where)
                assert area == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", AUTOMATIC)
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize(("size", "train_size", "k"), CASES)
def test_a_constant_keeps_its_gain_at_every_size(size, train_size, k, groups, name):
    """Away from borders, on a full lattice, to 1e-5 of the sum of the kernel's magnitudes."""
    torch.manual_seed(0)
    size, train_size = ((5 * n for n in lattice) for lattice in (size, train_size))  # room between the borders
    size, train_size = tuple(size), tuple(train_size)
    weight = torch.randn(6, 6 // groups, k, k)
    kernel_shape, span = kernel_window(k, size, train_size, CONVENTION)
    backend = get_backend(name)
    plan = backend.plan(Points(size), 1, kernel_shape, k, CPU, span)
    with torch.no_grad():
        out = points_to_image(backend.conv(torch.ones(1, size[0] * size[1], 6), weight, plan, groups), size)
    rows, cols = (slice(side // 2, n - side // 2) for side, n in zip(kernel_shape, size))
    gain, magnitude = weight.sum(dim=(1, 2, 3)), weight.abs().sum(dim=(1, 2, 3))
    assert out[0, :, rows, cols].numel() > 0
    assert ((out[0, :, rows, cols] - gain[:, None, None]).abs() <= 1e-5 * magnitude[:, None, None]).all()


@pytest.mark.parametrize("name", AUTOMATIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("size", "train_size", "k"), CASES)
def test_convolution_of_some_points_is_its_definition(size, train_size, k, dtype, name):
    torch.manual_seed(0)
    kernel_shape, span = kernel_window(k, size, train_size, CONVENTION)
    points = random_points(2, size, max(size[0] * size[1] // 6, 2))
    x, weight = torch.randn(2, points.count, 3, dtype=dtype), torch.randn(3, 1, k, k, dtype=dtype)
    backend = get_backend(name)
    found = backend.conv(x, weight, backend.plan(points, 2, kernel_shape, k, CPU, span), 3)
    reach = (kernel_shape[0] // 2, kernel_shape[1] // 2)
    rows, cols = (
        torch.tensor([[float(overlap(k, n, train_n, t, i)) for t in range(-far, far + 1)] for i in range(k)])
        for n, train_n, far in zip(size, train_size, reach)
    )
    taps = torch.einsum("cij,it,js->cts", weight[:, 0].double(), rows.double(), cols.double())
    covers = rows.double().sum(0)[:, None] * cols.double().sum(0)
    for ids, features, ours in zip(points.index.tolist(), x.double(), found):
        for m in range(min(len(ids), 30)):
            total, area = torch.zeros(3, dtype=torch.float64), 0.0
            for n, other in enumerate(ids):
                i = other // size[1] - ids[m] // size[1] + reach[0]
                j = other % size[1] - ids[m] % size[1] + reach[1]
                if 0 <= i < kernel_shape[0] and 0 <= j < kernel_shape[1]:
                    total, area = total + taps[:, i, j] * features[n], area + covers[i, j].item()
            torch.testing.assert_close(ours[m].double(), k**2 / area * total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "k", "factor"), [((9, 7), 3, 3), ((6, 8), 5, 3), ((5, 5), 3, 5)])
def test_functions_constant_in_each_cell_see_the_same_operator(size, k, factor):
    """With every cell of the training lattice cut into 3 × 3, the middle pixels have the value of the cell, at borders
    and in between.
    """
    torch.manual_seed(0)
    backend, weight = get_backend("auto"), torch.randn(4, 4, k, k, dtype=torch.float64)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    fine = tuple(factor * n for n in size)
    results = []
    for image in (x, x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)):
        lattice = tuple(image.shape[2:])
        kernel_shape, span = kernel_window(k, lattice, size, CONVENTION)
        plan = backend.plan(Points(lattice), 1, kernel_shape, k, CPU, span)
        results.append(points_to_image(backend.conv(image.flatten(2).mT, weight, plan, 1), lattice))
    assert tuple(results[1].shape[2:]) == fine
    middle = slice(factor // 2, None, factor)
    torch.testing.assert_close(results[1][:, :, middle, middle], results[0], rtol=1e-6, atol=1e-6)


def test_extents_that_happen_to_be_the_kernels_side_are_resampled_too():
    weight = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    kernel_shape, span = kernel_window(7, (15, 16), (16, 16), CONVENTION)
    assert kernel_shape == (7, 7) and span == (6.5625, 7.0)
    resampled = resample_kernel(weight, kernel_shape, span)
    rows = cell_overlaps(7, 7, 6.5625, CPU)
    torch.testing.assert_close(resampled, rows.T @ weight)
    native, dense = (get_backend(name) for name in AUTOMATIC)
    x = torch.randn(1, 240, 2, dtype=torch.float64)
    out = [b.conv(x, weight, b.plan(Points((15, 16)), 1, kernel_shape, 7, CPU, span), 2) for b in (native, dense)]
    torch.testing.assert_close(*out)
    plain = dense.conv(x, weight, dense.plan(Points((15, 16)), 1, kernel_shape, 7, CPU), 2)
    assert not torch.allclose(out[0], plain, rtol=1e-2, atol=1e-2)


def test_autocast_does_not_round_the_resampled_kernel():
    weight = torch.randn(8, 1, 5, 5)
    expected = resample_kernel(weight, (9, 11), (7.5, 10.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resample_kernel(weight, (9, 11), (7.5, 10.0)), expected)
    assert resample_kernel(weight.bfloat16(), (9, 11), (7.5, 10.0)).dtype == torch.bfloat16


def test_gradients_reach_the_kernel():
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resample_kernel(w, (5, 3), (4.5, 2.0)), weight)
    with torch.inference_mode():
        cell_overlaps.cache_clear()
        resample_kernel(weight, (5, 3), (4.5, 2.0))
    resample_kernel(weight, (5, 3), (4.5, 2.0)).sum().backward()


def test_numbers_at_the_training_size_are_those_of_whole_counts():
    points = random_points(2, (12, 10), 30)
    kernel_shape, span = kernel_window(5, (12, 10), (12, 10), CONVENTION)
    plain = inverse_density(points, kernel_shape, 5, CPU)
    assert torch.equal(inverse_density(points, kernel_shape, 5, CPU, span), plain)
    torch.testing.assert_close(inverse_density(points, kernel_shape, 5, CPU, (5.0, 5.0)), plain)
    assert kernel_shape == resampled_shape(5, (12, 10), (12, 10))


@pytest.mark.parametrize(("size", "train_size", "k"), CASES)
def test_a_continuous_kernel_fits_its_density(size, train_size, k):
    """A constant kernel gives a constant its k²-fold everywhere: at borders, and where points are thinned out."""
    block = SparseBlock(4, k, kernel="continuous", train_size=train_size)
    with torch.no_grad():
        block.kernel.layers[2].weight.zero_()
        block.kernel.layers[2].bias.fill_(0.03)
        for points in (Points(size), random_points(2, size, max(size[0] * size[1] // 4, 1))):
            batch = 1 if points.index is None else 2
            kernel_shape, span = kernel_window(k, size, train_size, CONVENTION)
            plan = block.backend.plan(points, batch, kernel_shape, k, CPU, span)
            out = block._integral(torch.ones(batch, points.count, 4), plan)
            torch.testing.assert_close(out, torch.full_like(out, 0.03 * k**2), rtol=1e-5, atol=1e-6)


def test_a_continuous_kernel_is_read_inside_its_window():
    torch.manual_seed(0)
    kernel, size, train_size = ContinuousKernel((3, 1), 3, (16, 16), 0.1), (24, 32), (16, 16)
    kernel_shape, span = kernel_window(3, size, train_size, CONVENTION)
    assert (kernel_shape, span) == ((5, 7), (4.5, 6.0))
    found = kernel(size, kernel_shape, span) / coverage(kernel_shape, span, CPU)
    u = [(torch.arange(side) - side // 2) * 2 / covered for side, covered in zip(kernel_shape, span)]
    for i, a in enumerate(u[0].clamp(-1, 1)):
        for j, b in enumerate(u[1].clamp(-1, 1)):
            torch.testing.assert_close(found[:, 0, i, j], kernel.layers(torch.stack([a, b])).double())
    assert u[1][-1] == 1.0
