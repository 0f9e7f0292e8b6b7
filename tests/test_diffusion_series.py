"""Values of cosine series anywhere: against closed forms, a slow double sum and numerical derivatives."""

import math
import re

import pytest
import torch

from diffusion import series
from diffusion.mollifier import Mollifier
from diffusion.series import on_lattice, series_values
from known_answers import coefficients, seeded

SIZES = [(8, 8), (6, 11), (1, 7), (5, 1)]
ORDERS = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
WAVES = [(1.3, 0, 0), (0.7, 1, 0), (-0.5, 3, 2), (0.4, 0, 4), (0.2, 5, 6)]  # amplitude, k, l


def lattice(size):
    """The pixels (H·W, 2) of a lattice."""
    axes = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2)


def anywhere(*shape):
    return torch.rand(*shape, 2, dtype=torch.float64, generator=seeded(1))


def derived(k: int, places: torch.Tensor, order: int) -> torch.Tensor:
    """d^order cos(πkx) / dx^order, by the shift of a cosine that deriving it is."""
    return (math.pi * k) ** order * torch.cos(math.pi * k * places + order * math.pi / 2)


def closed_form(points, order=(0, 0)):
    return sum(a * derived(k, points[:, 0], order[0]) * derived(l, points[:, 1], order[1]) for a, k, l in WAVES)  # noqa: E741


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [(8, 8), (7, 12), (64, 9)])
def test_a_sum_of_cosines_is_known_everywhere(size, order, monkeypatch):
    """From lattices of any size that hold its waves, edges of the square included, in blocks of one point and at
    once."""
    points = torch.cat([anywhere(20), torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)])
    samples = closed_form(lattice(size)).reshape(1, 1, *size)
    expected = closed_form(points, order)
    for at_once in (1 << 22, 1):
        monkeypatch.setattr(series, "_AT_ONCE", at_once)
        found = series_values(samples, points, order)[0, 0]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11 * expected.abs().max())


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_double_sum_and_passes_through_the_samples(size):
    samples = torch.randn(2, 3, *size, dtype=torch.float64, generator=seeded())
    found = series_values(samples, lattice(size)).reshape(samples.shape)
    torch.testing.assert_close(found, samples, rtol=0, atol=1e-12)
    points, spectrum = anywhere(2, 4), coefficients(samples)
    for band in (None, (3, 2)):
        rows, cols = size if band is None else map(min, size, band)
        found = series_values(samples, points, band=band)
        for b, p in ((0, 1), (1, 3)):
            y, x = points[b, p].tolist()
            expected = sum(
                spectrum[b, 2, i, j]
                * math.sqrt((2 if i else 1) / size[0]) * math.cos(math.pi * i * y)
                * math.sqrt((2 if j else 1) / size[1]) * math.cos(math.pi * j * x)
                for i in range(rows) for j in range(cols)
            )  # fmt: skip
            assert float(found[b, 2, p]) == pytest.approx(expected, abs=1e-12)


def test_a_function_is_read_at_the_pixels_of_another_lattice():
    """At ratios that are not whole, and coarser ones, which waves are read from all the same."""
    for size, other in (((48, 9), (32, 5)), ((7, 8), (20, 33)), ((6, 7), (6, 7))):
        here, there = (closed_form(lattice(n)).reshape(1, 1, *n) for n in (size, other))
        torch.testing.assert_close(on_lattice(here, other), there, rtol=0, atol=1e-12)


def test_it_commutes_with_the_mollifier_at_every_size():
    """T of a sum of cosines, read from two lattices, is the same function."""
    mollifier, points = Mollifier(1.0, (8, 8)), anywhere(9)
    sizes = [(8, 8), (33, 20)]
    read = [series_values(mollifier(closed_form(lattice(size)).reshape(1, 1, *size)), points) for size in sizes]
    torch.testing.assert_close(*read, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients(order, monkeypatch):
    monkeypatch.setattr(series, "_AT_ONCE", 1)  # a block for each point
    samples = torch.randn(2, 1, 4, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
    points = anywhere(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, p: series_values(s, p, order), (samples, points))
    if sum(order) < 2:  # the next derivative along y is the gradient with respect to y
        (found,) = torch.autograd.grad(series_values(samples, points, order).sum(), points)
        torch.testing.assert_close(found[..., 0], series_values(samples, points, (order[0] + 1, order[1]))[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    samples, points = torch.randn(1, 2, 12, 20).to(dtype), anywhere(5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = series_values(samples, points)
    assert found.dtype == torch.float32 and torch.equal(found, series_values(samples.float(), points))
    exact = series_values(samples.double(), points.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": torch.zeros(4, 4)}, "samples are torch.float32 (4, 4)"),
        ({"samples": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)}, "samples are torch.uint8"),
        ({"samples": torch.full((1, 1, 4, 4), math.nan)}, "samples are not finite"),
        ({"coordinates": torch.zeros(3)}, "coordinates are torch.float32 (3,)"),
        ({"coordinates": torch.zeros(3, 2, 2)}, "coordinates are torch.float32 (3, 2, 2)"),
        ({"coordinates": torch.zeros(3, 2, dtype=torch.int64)}, "coordinates are torch.int64"),
        ({"coordinates": torch.tensor([[0.5, 1.01]])}, "coordinates leave the unit square"),
        ({"coordinates": torch.tensor([[0.5, math.nan]])}, "coordinates leave the unit square or are not finite"),
        ({"order": (2, 1)}, "order is (2, 1)"),
        ({"order": (-1, 0)}, "order is (-1, 0)"),
        ({"band": (0, 3)}, "band is (0, 3)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"samples": torch.zeros(1, 1, 4, 4), "coordinates": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*accepted"):
        series_values(**(good | change))
