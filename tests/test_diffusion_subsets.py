"""Monte-Carlo points: distinct, fair, reproducible, and for the low-discrepancy kinds more even than chance."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.stats import qmc

from diffusion.coordinates import validate_points
from diffusion.subsets import DRAWS, _radical_inverse, draw_points


def draw(kind, batch, size, count, seed=0):
    return draw_points(kind, torch.Generator().manual_seed(seed), batch, size, count, "cpu")


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(
    ("size", "count"), [((16, 16), 64), ((9, 20), 45), ((7, 5), 34), ((1, 13), 4), ((8, 8), 1), ((128, 128), 4096)]
)
def test_points_are_distinct_in_the_order_of_tiles_and_as_many_as_asked(kind, size, count):
    points = draw(kind, 3, size, count)
    validate_points(points)
    assert points.index.shape == (3, count) and points.size == size
    for ids in points.index.tolist():
        places = [(*(axis // 8 for axis in divmod(i, size[1])), i) for i in ids]  # tile row, tile column, id
        assert places == sorted(places)
    if 1 < count < math.prod(size) - 1:
        assert not torch.equal(points.index[0], points.index[1])


@pytest.mark.parametrize("kind", DRAWS)
def test_all_points_are_every_pixel(kind):
    assert torch.equal(draw(kind, 2, (6, 7), 42).index, torch.arange(42).repeat(2, 1))
    assert torch.equal(draw(kind, 2, (9, 17), 153).index.sort(dim=1).values, torch.arange(153).repeat(2, 1))


@pytest.mark.parametrize("kind", DRAWS)
def test_the_generator_decides(kind):
    first, again, other = (draw(kind, 2, (12, 10), 30, seed).index for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("kind", DRAWS)
def test_every_pixel_is_equally_likely(kind):
    """Chi-square at the 0.1 % level. Points of one draw are dependent, which only narrows the counts."""
    draws, size, count = 4000, (6, 8), 12
    counts = np.bincount(draw(kind, draws, size, count).index.flatten().numpy(), minlength=48)
    expected = draws * count / 48
    assert ((counts - expected) ** 2 / expected).sum() < scipy.stats.chi2.ppf(0.999, 47)


def test_uniform_pairs_are_equally_likely():
    """Of 5 pixels all 10 pairs come up equally often: the draw is uniform over subsets, not only over pixels."""
    index = draw("uniform", 20_000, (1, 5), 2).index
    counts = np.bincount((index[:, 0] * 5 + index[:, 1]).numpy(), minlength=25)
    counts = counts[counts > 0]
    assert len(counts) == 10
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_radical_inverse_is_the_halton_sequence():
    expected = qmc.Halton(2, scramble=False).random(100)
    torch.testing.assert_close(
        torch.stack([_radical_inverse(100, base) for base in (2, 3)], dim=1), torch.from_numpy(expected)
    )


@pytest.mark.parametrize("kind", ["halton", "sobol"])
@pytest.mark.parametrize("size", [(64, 64), (40, 96)])
def test_low_discrepancy_points_are_more_even_than_chance(kind, size):
    """Star discrepancy over boxes of pixels: the worst difference between the share of points and of area."""

    def discrepancy(name):
        index = draw(name, 8, size, math.prod(size) // 4).index
        present = torch.zeros(8, math.prod(size), dtype=torch.float64).scatter_(1, index, 4 / math.prod(size))
        share = present.view(8, *size).cumsum(1).cumsum(2)
        area = torch.outer(*(torch.arange(1, n + 1, dtype=torch.float64) / n for n in size))
        return (share - area).abs().amax(dim=(1, 2)).mean()

    assert discrepancy(kind) < 0.5 * discrepancy("uniform")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gaussian", (4, 4), 4), "uniform, halton, sobol"),
        (("uniform", (4, 4), 0), "1 to 16"),
        (("sobol", (4, 5), 21), "4x5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    kind, size, count = arguments
    with pytest.raises(ValueError, match=message):
        draw(kind, 1, size, count)
