"""Gaussian random fields, for which the optimal denoiser is known: every sampler against the exact answer.

Let the cosine coefficients a_k of x_0 be independent with variance c_k. A state has the coefficients y_k = g_k (√ᾱ
a_k + √(1 - ᾱ) s ξ_k), with g the gain of the mollifier T and s its noise scale at the resolution. Everything is
Gaussian, so the best prediction of the mollified noise is linear,

    E[g_k s ξ_k | y_k] = √(1 - ᾱ) s² / (ᾱ c_k + (1 - ᾱ) s²) · y_k,

in which g has cancelled. A sampler that starts from T ξ must end with variance g_k² c_k. Because each step is linear
and diagonal, the variance it does end with needs no Monte-Carlo: one run follows, as a batch, the response to the
initial state and to the noise of every single step, and the squares of the responses add up.

The oracle below uses scipy's DCT and the formula of the schedule, nothing of `diffusion`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffusion.mollifier import Mollifier
from diffusion.process import DiffusionProcess, Prediction, Variance
from diffusion.samplers import ancestral, ddim, ddim_invert
from known_answers import TRAIN_SIZE, coefficients, image, process_of, seeded, two_modes

SIZES = [(8, 8), (6, 10), (9, 16), (7, 5)]  # the training resolution; not square; finer; odd and coarser


def gains(size: tuple[int, int], sigma: float = 1.0) -> np.ndarray:
    """g of a mollifier of sigma pixels of TRAIN_SIZE; its width in pixels scales with the resolution, so only N
    enters."""
    k, l = (np.arange(n) / train for n, train in zip(size, TRAIN_SIZE))  # noqa: E741 (the index of the formula)
    return np.exp(-((sigma * np.pi) ** 2) * (k[:, None] ** 2 + l[None] ** 2) / 2)


def spectrum(size: tuple[int, int]) -> np.ndarray:
    """A falling power law, from 1 down to about 0.01, in units of coefficients at this resolution (∝ pixels)."""
    k, l = (np.arange(n) for n in size)  # noqa: E741
    return math.prod(size) / math.prod(TRAIN_SIZE) / (1 + 0.5 * (k[:, None] ** 2 + l[None] ** 2))


class Oracle:
    """The optimal network for a random field, for every kind of prediction."""

    def __init__(self, process: DiffusionProcess, size: tuple[int, int]):
        self.kind = process.prediction
        self.steps = process.schedule.original_steps
        self.gain = np.ones(size) if process.mollifier.identity else gains(size)
        self.noise_variance = 1.0 if process.mollifier.identity else math.prod(size) / math.prod(TRAIN_SIZE)
        self.c = spectrum(size)

    def alpha_bar(self, step: int) -> float:
        """The cosine schedule at a step of the original process; its betas are capped at 0.999 only at the last
        step."""
        values = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (0, (step + 1) / self.steps)]
        return values[1] / values[0]

    def ratios(self, alpha_bar: float) -> tuple[np.ndarray, np.ndarray]:
        """E[g a | y] / y and E[g s ξ | y] / y."""
        total = alpha_bar * self.c + (1 - alpha_bar) * self.noise_variance
        return math.sqrt(alpha_bar) * self.c / total, math.sqrt(1 - alpha_bar) * self.noise_variance / total

    def __call__(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha_bar = self.alpha_bar(round(float(time[0]) * self.steps / 1000))
        signal, noise = self.ratios(alpha_bar)
        factor = {
            Prediction.MOLLIFIED_EPS: noise,
            Prediction.EPS: noise / self.gain,
            Prediction.X0: signal / self.gain,
            Prediction.V: (math.sqrt(alpha_bar) * noise - math.sqrt(1 - alpha_bar) * signal) / self.gain,
        }[self.kind]
        return image(factor * coefficients(x))


def make(steps: int, size: tuple[int, int], sigma: float = 1.0, **kinds) -> tuple[DiffusionProcess, Callable, Oracle]:
    # The last step is never kept: there ᾱ is capped, and the oracle's formula with it.
    kept = [round(i * 998 / (steps - 1)) for i in range(steps)]
    prediction = kinds.pop("prediction", Prediction.MOLLIFIED_EPS)
    process = process_of(prediction, sigma=sigma, **kinds).respaced(kept)
    oracle = Oracle(process, size)
    return process, process.denoiser(oracle, clip=False), oracle


def sampled_variance(run: Callable, process: DiffusionProcess, size: tuple[int, int]) -> np.ndarray:
    """Variance of each coefficient after a linear sampler, exactly.

    run: (initial state, noise source) -> result. Item 0 of the batch holds the response to the initial state, item j
    that to the j-th noise drawn; each impulse has every coefficient at its standard deviation.
    """
    steps = process.schedule.num_steps
    impulse = process.mollifier.noise(image(np.ones((1, 1, *size))))
    initial = torch.zeros(steps, 1, *size, dtype=torch.float64)
    initial[0] = impulse
    drawn = 0

    def noise() -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        response = torch.zeros_like(initial)
        response[drawn] = impulse
        return response

    return (coefficients(run(initial, noise)) ** 2).sum(axis=(0, 1))


def recursion(oracle: Oracle, process: DiffusionProcess, sigma2: Callable, eta: float | None) -> np.ndarray:
    """The variance of the same sampler written down by hand; eta None is the ancestral sampler with variances
    sigma2."""
    alpha_bars = [oracle.alpha_bar(step) for step in process.schedule.timestep_map.tolist()]
    noise_variance = oracle.noise_variance * oracle.gain**2
    variance = noise_variance
    for t in reversed(range(len(alpha_bars))):
        now, before = alpha_bars[t], alpha_bars[t - 1] if t > 0 else 1.0
        signal, noise = oracle.ratios(now)
        beta = 1 - now / before
        if eta is None:
            added = sigma2(beta, now, before) if t > 0 else 0.0
            from_x_0, from_x_t = math.sqrt(before) * beta / (1 - now), math.sqrt(1 - beta) * (1 - before) / (1 - now)
            factor = from_x_0 * signal + from_x_t
        else:
            added = eta**2 * (1 - before) / (1 - now) * beta
            factor = math.sqrt(before) * signal + math.sqrt(1 - before - added) * noise
        variance = factor**2 * variance + added * noise_variance
    return variance


ANCESTRAL = {
    Variance.FIXED_LARGE: lambda beta, now, before: beta,
    Variance.FIXED_SMALL: lambda beta, now, before: beta * (1 - before) / (1 - now),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sampler", ["fixed_large", "fixed_small", 0.0, 0.5, 1.0])
def test_sampler_has_the_variance_of_the_field(sampler, size):
    """The ancestral sampler with both variances and DDIM with three η: exact for finitely many steps, and in the
    limit."""
    eta = sampler if isinstance(sampler, float) else None
    variance = Variance.FIXED_LARGE if eta is not None else Variance(sampler)
    errors = []
    for steps in (30, 120, 999):
        process, denoise, oracle = make(steps, size, variance=variance)
        expected = recursion(oracle, process, ANCESTRAL[variance], eta)
        if steps < 999:  # the recursion is then known to be that of the sampler, and stands in for it
            actual = sampled_variance(sampler_of(denoise, process, eta), process, size)
            np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-20)
        errors.append(np.abs(expected / (oracle.gain**2 * oracle.c) - 1).mean())
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.25 * errors[1]
    assert errors[2] < 0.03


def sampler_of(denoise: Callable, process: DiffusionProcess, eta: float | None) -> Callable:
    if eta is None:
        return lambda x, noise: ancestral(denoise, x, process, noise=noise)
    return lambda x, noise: ddim(denoise, x, process, eta=eta, noise=noise)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_every_prediction_gives_the_same_samples(prediction, sigma):
    size = (6, 10)
    white = torch.randn(3, 2, *size, dtype=torch.float64, generator=seeded(0))
    results = []
    for kind in (Prediction.MOLLIFIED_EPS, prediction):
        process, denoise, _ = make(12, size, sigma, prediction=kind)
        generator = seeded(1)

        def noise(process=process, generator=generator):
            return process.mollifier.noise(torch.randn(white.shape, dtype=torch.float64, generator=generator))

        start = process.mollifier.noise(white)
        results.append(torch.stack([ancestral(denoise, start, process, noise=noise), ddim(denoise, start, process)]))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_ancestral_samples_by_monte_carlo():
    size, batch = (6, 10), 4000
    process, denoise, oracle = make(40, size)
    generator = seeded(2)

    def noise() -> torch.Tensor:
        return process.mollifier.noise(torch.randn(batch, 1, *size, generator=generator))

    samples = coefficients(ancestral(denoise, noise(), process, noise=noise))
    ratio = (samples**2).mean(axis=(0, 1)) / recursion(oracle, process, ANCESTRAL[Variance.FIXED_LARGE], eta=None)
    assert np.abs(ratio - 1).max() < 5 * math.sqrt(2 / batch)
    assert np.abs(samples.mean(axis=(0, 1)) / samples.std(axis=(0, 1))).max() < 5 / math.sqrt(batch)


@pytest.mark.parametrize("size", SIZES)
def test_inversion_is_undone_by_ddim(size):
    generator = np.random.default_rng(3)
    errors = []
    for steps in (25, 100, 400):
        process, denoise, oracle = make(steps, size)
        clean = image(oracle.gain * np.sqrt(oracle.c) * generator.standard_normal((2, 3, *size)))
        code = ddim_invert(denoise, clean, process)
        returned = ddim(denoise, code, process)
        errors.append(float((returned - clean).norm() / clean.norm()))
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]
    assert errors[2] < 0.01


def test_inversion_from_the_middle():
    size = (9, 16)
    process, denoise, oracle = make(200, size)
    clean = image(oracle.gain * np.sqrt(oracle.c) * np.random.default_rng(4).standard_normal((2, 3, *size)))
    for level in (0, 60, 150):
        code = ddim_invert(denoise, clean, process, stop=level)
        torch.testing.assert_close(ddim(denoise, code, process, start=level), clean, rtol=0, atol=0.03)


def test_inversion_of_a_two_mode_density():
    """A linear denoiser hides the order of the steps, since they commute; that of a mixture of two Gaussians does
    not."""
    process = process_of(Prediction.EPS, sigma=0.0).respaced("200")
    spread, generator, denoise = 0.3, seeded(5), two_modes(process)
    x = torch.randn(500, 1, dtype=torch.float64, generator=generator) * spread
    x = x + torch.randint(2, x.shape, generator=generator) * 2 - 1
    code = ddim_invert(denoise, x, process)
    assert (ddim(denoise, code, process) - x).abs().mean() < 0.01
    assert abs(float((code**2).mean()) - 1) < 0.1  # noise, as the forward process would have made it


@pytest.mark.parametrize("size", SIZES)
def test_wiener_filter_reaches_its_least_error(size):
    """y = g a + n with a of unit and n of variance e² is restored with the error e² / (g² + e²) per coefficient."""
    level, batch = 0.2, 3000
    generator = np.random.default_rng(6)
    truth = generator.standard_normal((batch, 1, *size))
    seen = image(gains(size) * truth + level * generator.standard_normal(truth.shape))
    mollifier = Mollifier(1.0, TRAIN_SIZE)
    errors = {
        assumed: ((coefficients(mollifier.inverse(seen, assumed)) - truth) ** 2).mean(axis=(0, 1))
        for assumed in (level / 2, level, level * 2)
    }
    least = level**2 / (gains(size) ** 2 + level**2)
    assert np.abs(errors[level] / least - 1).max() < 5 * math.sqrt(2 / batch)
    assert errors[level].mean() < min(errors[level / 2].mean(), errors[level * 2].mean())


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (128, 128), (48, 80), (33, 47)])
def test_mollified_noise_has_one_variance_at_every_resolution(size):
    """Var Tξ at the point (u, v) is, per axis, (1 + 2 Σ_k g_k² cos²(πku)) / N, whatever the resolution."""
    train = 32
    mollifier = Mollifier(1.0, (train, train))
    k = np.arange(1, 4 * train)
    pixels = [(0, 0), (size[0] // 2, size[1] // 3), (size[0] - 1, 1), (size[0] // 5, size[1] - 1)]
    for row, col in pixels:
        impulse = torch.zeros(size, dtype=torch.float64)
        impulse[row, col] = 1
        # T is symmetric: its row at the pixel is its answer to an impulse there.
        variance = float(mollifier.noise(impulse).square().sum())
        expected = math.prod(
            (1 + 2 * (np.exp(-((np.pi * k / train) ** 2)) * np.cos(np.pi * k * (i + 0.5) / n) ** 2).sum()) / train
            for i, n in zip((row, col), size)
        )
        assert variance == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 64), (128, 128), (48, 80), (33, 47)])
@pytest.mark.parametrize("train_size", [(32, 32), (24, 40)])
def test_mollifier_is_one_operator_on_functions(size, train_size):
    """Σ a cos(πku) cos(πlv), sampled at cell centres and smoothed, is Σ a exp(-σ²π²(k²/N_h² + l²/N_w²)/2) cos cos
    there."""
    sigma = 1.3
    u, v = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size)
    sampled = expected = torch.zeros(size, dtype=torch.float64)
    for amplitude, k, l in [(1.0, 0, 0), (0.7, 1, 0), (-0.5, 3, 2), (0.4, 0, 15), (0.9, 11, 7), (-0.3, 15, 15)]:  # noqa: E741
        wave = amplitude * torch.outer(torch.cos(math.pi * k * u), torch.cos(math.pi * l * v))
        sampled = sampled + wave
        squares = (k / train_size[0]) ** 2 + (l / train_size[1]) ** 2
        expected = expected + wave * math.exp(-((sigma * math.pi) ** 2) * squares / 2)
    torch.testing.assert_close(Mollifier(sigma, train_size)(sampled), expected, rtol=0, atol=1e-12)
