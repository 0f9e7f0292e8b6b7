"""Power-function averages against integrals by quadrature and against averages computed directly."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch

from training.power_averages import LONGEST, combination, exponent, length, newest_weight


def profile(tau, gamma, t):
    return (gamma + 1) * tau**gamma / t ** (gamma + 1) * (tau <= t)


@pytest.mark.parametrize("gamma", [0.0, 0.7, 6.94, 16.97, 200.0])
def test_length_is_the_relative_deviation_of_the_profile(gamma):
    t = 3.0
    moments = [scipy.integrate.quad(lambda x, k=k: x**k * profile(x, gamma, t), 0, t)[0] for k in range(3)]
    assert moments[0] == pytest.approx(1)
    deviation = math.sqrt(moments[2] - moments[1] ** 2) / t
    assert length(gamma) == pytest.approx(deviation, rel=1e-6)
    assert exponent(length(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-9)


def test_lengths_of_the_source():
    """Karras et al. 2024 keep 0.05 and 0.10, which are γ = 16.97 and 6.94."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005) and exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(LONGEST) == 0
    for wrong in (0.0, -0.1, 0.3, math.nan):
        with pytest.raises(ValueError, match="the length of an average is"):
            exponent(wrong)


def averages(walk, gamma, times):
    """The recursion, at the given times."""
    found, average = {}, np.zeros(walk.shape[1:])
    for n, theta in enumerate(walk, 1):
        average = average + newest_weight(gamma, n) * (theta - average)
        if n in times:
            found[n] = average.copy()
    return [found[n] for n in times]


@pytest.mark.parametrize("gamma", [0.0, 2.5, 16.97])
def test_updates_weigh_by_the_integral_of_the_profile(gamma):
    n = 40
    edges = (np.arange(n + 1) / n) ** (gamma + 1)
    (weights,) = averages(np.eye(n), gamma, [n])
    np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-12, atol=1e-15)


def test_inner_products_by_quadrature():
    """Through the misfit: with one average, the best profile is a multiple of it, here with sum 1."""
    for (t, gamma), (time, wanted) in [((7.0, 3.0), (10.0, 5.0)), ((10.0, 0.5), (10.0, 9.0))]:
        coefficients, misfit = combination([t], [gamma], time, wanted)

        def square(x, t=t, gamma=gamma, time=time, wanted=wanted):
            return (profile(x, gamma, t) - profile(x, wanted, time)) ** 2

        difference = sum(scipy.integrate.quad(square, a, b)[0] for a, b in ((0, t), (t, time)) if b > a)
        norm = scipy.integrate.quad(lambda x, w=wanted, T=time: profile(x, w, T) ** 2, 0, time)[0]
        assert coefficients.tolist() == [1.0]
        assert misfit == pytest.approx(math.sqrt(difference / norm), rel=1e-6)


STORED = [(n, sigma) for n in range(250, 4001, 250) for sigma in (0.05, 0.10)]


def stored(walk):
    times = sorted({n for n, _ in STORED})
    of = {sigma: dict(zip(times, averages(walk, exponent(sigma), times))) for sigma in (0.05, 0.10)}
    return np.stack([of[sigma][n] for n, sigma in STORED])


@pytest.fixture(scope="module")
def walk():
    return np.cumsum(np.random.default_rng(0).standard_normal((4000, 50)), axis=0)


@pytest.mark.parametrize("sigma", [0.04, 0.07, 0.08, 0.15, 0.2])
def test_a_length_in_between_of_a_long_random_walk(walk, sigma):
    """The error is small beside what the choice of the length changes."""
    coefficients, misfit = combination([n for n, _ in STORED], [exponent(s) for _, s in STORED], 4000, exponent(sigma))
    found = np.tensordot(coefficients.numpy(), stored(walk), 1)
    (direct,) = averages(walk, exponent(sigma), [4000])
    near = averages(walk, exponent(0.05), [4000])[0], averages(walk, exponent(0.1), [4000])[0]
    assert float(coefficients.sum()) == pytest.approx(1, abs=1e-12)
    assert np.abs(found - direct).mean() < 0.02 * np.abs(near[0] - near[1]).mean()
    assert misfit < 0.03


def test_an_earlier_end_can_be_chosen(walk):
    coefficients, _ = combination([n for n, _ in STORED], [exponent(s) for _, s in STORED], 3100, exponent(0.08))
    (direct,) = averages(walk, exponent(0.08), [3100])
    found = np.tensordot(coefficients.numpy(), stored(walk), 1)
    scale = np.abs(walk[3099] - direct).mean()
    assert np.abs(found - direct).mean() < 0.05 * scale


@pytest.mark.parametrize(("n", "sigma"), [(4000, 0.05), (4000, 0.10), (2000, 0.10)])
def test_a_stored_average_is_itself(n, sigma):
    coefficients, misfit = combination([n for n, _ in STORED], [exponent(s) for _, s in STORED], n, exponent(sigma))
    one = torch.zeros(len(STORED), dtype=torch.float64)
    one[STORED.index((n, sigma))] = 1
    torch.testing.assert_close(coefficients, one, rtol=0, atol=1e-4)
    assert misfit < 1e-6


def test_what_the_stored_averages_cannot_show_has_a_large_misfit():
    _, misfit = combination([100.0, 100.0], [exponent(0.1), exponent(0.2)], 100.0, exponent(0.01))
    assert misfit > 0.5
