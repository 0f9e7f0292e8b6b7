"""Conditioning on measurements: on Gaussian fields it is kriging; operators against dense matrices; wrong sensors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import torch

from benchmarks.posterior import gaussian_rows, table
from diffusion.posterior import Measured, conjugate_residuals
from diffusion.process import Prediction
from diffusion.samplers import SAMPLERS
from diffusion.sensors import Sensors, lower_resolution, pixels, smooth_guess
from known_answers import coefficients, process_of, seeded


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(seed))


def somewhere(count: int, channels: int = 1, sd: float = 0.0, seed: int = 0) -> Sensors:
    """Sensors, every second of which averages over a rectangle; the first value of the last channel is missing."""
    places, sides = 0.2 + 0.6 * some(count, 2, seed=seed), 0.3 * some(count, 2, seed=seed + 1)
    sides[::2] = 0
    values = 2 * some(count, channels, seed=seed + 2) - 1
    values[0, -1] = math.nan if channels > 1 else values[0, -1]
    return Sensors(places, values, sd, sides)


def dense(observe, shape: tuple[int, ...]) -> torch.Tensor:
    """H as a matrix (M, C·H·W), by the images of unit vectors."""
    return observe(torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)).mT


def series(spectrum: np.ndarray, y: float, x: float) -> float:
    """A cosine series by its definition, term by term."""
    total = 0.0
    for (k, l), value in np.ndenumerate(spectrum):  # noqa: E741 (the index of the formula)
        scale = math.prod(math.sqrt((1 if i == 0 else 2) / n) for i, n in zip((k, l), spectrum.shape))
        total += value * scale * math.cos(math.pi * k * y) * math.cos(math.pi * l * x)
    return total


def test_sensors_read_points_and_rectangles_of_the_series():
    """Against sums and numerical integrals of the series, channel by channel."""
    field, sensors = some(1, 2, 5, 7), somewhere(4, channels=2)
    read = iter(sensors.observer(torch.device("cpu"))(field)[0].tolist())
    for channel, spectrum in enumerate(coefficients(field)[0]):
        for (y, x), (height, width), value in zip(sensors.places.tolist(), sensors.sides.tolist(), sensors.values):
            if not value[channel].isnan():
                expected = series(spectrum, y, x)
                if height:
                    box = x - width / 2, x + width / 2, y - height / 2, y + height / 2
                    total = scipy.integrate.dblquad(lambda y, x: series(spectrum, y, x), *box)[0]  # noqa: B023
                    expected = total / height / width
                assert next(read) == pytest.approx(expected, abs=1e-9)
    assert len(sensors.readings) == len(sensors.variance) == 7 and next(read, None) is None


OPERATORS = {
    "sensors": somewhere(6, channels=2).observer(torch.device("cpu")),
    "pixels": pixels(some(9, 6) > 0.6),
    "lower": lower_resolution((4, 3)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_linear_and_autograd_is_their_adjoint(name):
    observe, u = OPERATORS[name], some(2, 2, 9, 6, seed=5).requires_grad_()
    matrix, seen = dense(observe, (2, 9, 6)), observe(u)
    torch.testing.assert_close(seen, u.flatten(1) @ matrix.mT)
    weights = some(*seen.shape, seed=6)
    for _ in range(2):  # more than once through one graph
        (adjoint,) = torch.autograd.grad(seen, u, weights, retain_graph=True)
        torch.testing.assert_close((adjoint * u).sum(), (weights * seen).sum())
        torch.testing.assert_close(adjoint.flatten(1), weights @ matrix)


@pytest.mark.parametrize("skew", [0.0, 0.3])
def test_conjugate_residuals_solve_a_batch_as_a_dense_solver_does(skew):
    """Symmetric or nearly; one item is singular, one has nothing to solve; the residual never grows."""
    factor, turned = some(3, 12, 12) - 0.5, some(3, 12, 12, seed=1) - 0.5
    matrix = factor @ factor.mT + 0.1 * torch.eye(12, dtype=torch.float64) + skew * (turned - turned.mT)
    right = some(3, 12, seed=2)
    matrix[2], right[2] = torch.diag(torch.arange(12.0)).double(), torch.arange(12.0).double()
    right[1] = 0

    def residual(iterations: int) -> torch.Tensor:
        found = conjugate_residuals(lambda w: (matrix @ w[..., None])[..., 0], right, iterations, 1e-10)
        return (right - (matrix @ found[..., None])[..., 0]).norm(dim=1)

    sizes = torch.stack([residual(n) for n in range(14)])
    assert (sizes.diff(dim=0) <= 1e-9).all() and (sizes[-1] < 1e-8).all()
    found = conjugate_residuals(lambda w: (matrix @ w[..., None])[..., 0], right, 12, 1e-10)
    torch.testing.assert_close(found[0], torch.linalg.solve(matrix[0], right[0]))


class Field:
    """A Gaussian random field, its optimal denoiser for any prediction, and its posterior by dense matrices."""

    def __init__(self, size, prediction: Prediction, sigma: float, train, steps: str = "logsnr30"):
        k, l = (np.arange(n) for n in size)  # noqa: E741 (the index of the formula)
        self.size, self.process = size, process_of(prediction, sigma=sigma, size=train).respaced(steps)
        self.white = self.process.mollifier.noise_scale(size) ** 2
        c = 1 / (1 + 0.5 * (k[:, None] ** 2 + l**2))
        self.c = c * (0.25 * math.prod(size) / c.sum())
        widths = [sigma * n / own for n, own in zip(size, train)]
        self.gain = np.exp(-(np.pi**2) / 2 * sum((w * f / n) ** 2 for w, f, n in zip(widths, (k[:, None], l), size)))
        basis = coefficients(torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, *size))
        self.basis = torch.from_numpy(basis.reshape(len(basis), -1))  # (pixel, coefficient)

    def filtered(self, factor: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        return ((x.flatten(2) @ self.basis) * torch.from_numpy(factor).flatten() @ self.basis.mT).reshape(x.shape)

    def denoise(self, x: torch.Tensor, t: torch.Tensor):
        a2 = float(self.process.schedule.alpha_bar[t[0]])
        total = a2 * self.c + (1 - a2) * self.white
        sharp = self.process.prediction is Prediction.X0
        factor = math.sqrt(a2) * self.c / total / self.gain if sharp else math.sqrt(1 - a2) * self.white / total
        return self.process.denoiser(lambda x, time: self.filtered(factor, x), clip=False)(x, t)

    def posterior(self, matrix: torch.Tensor, y: torch.Tensor, variance: torch.Tensor, sharp: bool):
        """Mean and covariance of T x_0 given H T x_0 or, if sharp, H x_0, with H as a matrix."""
        gain = torch.from_numpy(self.gain).flatten()
        prior = (self.basis * torch.from_numpy(self.c).flatten() * gain**2) @ self.basis.mT
        if sharp:
            matrix = matrix @ (self.basis / gain) @ self.basis.mT
        cross = prior @ matrix.mT
        weights = torch.linalg.solve(matrix @ cross + torch.diag(variance), torch.cat([y[:, None], cross.mT], 1))
        return cross @ weights[:, 0], prior - cross @ weights[:, 1:]


@pytest.mark.parametrize(
    ("prediction", "sigma", "size", "sampler", "sharp", "sd"),
    [
        (Prediction.MOLLIFIED_EPS, 1.0, (6, 5), "ddim", False, 0.02),
        (Prediction.X0, 1.0, (5, 7), "dpmpp", True, 0.0),
        (Prediction.X0, 0.5, (8, 6), "dpmpp", False, 0.1),  # above the training size
        (Prediction.EPS, 0.0, (4, 6), "ddim", False, 0.05),  # no mollifier
    ],
)
def test_on_gaussian_fields_it_is_kriging(prediction, sigma, size, sampler, sharp, sd):
    """The sampler is affine in its first state: what it makes of 0 is its mean, of unit vectors its covariance."""
    sensors, steps = somewhere(5, sd=sd), "100" if sampler == "ddim" else "logsnr30"
    field = Field(size, prediction, sigma, (5, 4) if size == (8, 6) else size, steps)
    observe = sensors.observer(torch.device("cpu"))
    measured = Measured(observe, sensors.readings, sensors.variance, field.process, sharp)
    pixel_count = math.prod(size)
    x = torch.zeros(pixel_count + 1, 1, *size, dtype=torch.float64)
    x[1:] = field.process.mollifier.noise(torch.eye(pixel_count, dtype=torch.float64).reshape(-1, 1, *size))
    run = SAMPLERS[sampler].draw
    drawn = run(measured.posterior(field.denoise), x, field.process).flatten(1)
    spread = drawn[1:] - drawn[0]
    mean, covariance = field.posterior(dense(observe, (1, *size)), sensors.readings, sensors.variance, sharp)
    assert (drawn[0] - mean).norm() < 0.02 * mean.norm()
    ratio = (spread.square().sum(0).mean() / covariance.diag().mean()).sqrt()
    assert 0.95 < float(ratio) < 1.05
    assert (spread.mT @ spread - covariance).norm() < 0.1 * covariance.norm()


def test_sharp_estimates_are_those_of_the_smooth_ones_and_stay_in_range():
    field, sensors = Field((9, 11), Prediction.X0, 1.0, (9, 11)), somewhere(5)
    observe, x = sensors.observer(torch.device("cpu")), 3 * some(2, 1, 9, 11)
    for t in (torch.tensor([5, 5]), torch.tensor([25, 25])):
        free = Measured(observe, sensors.readings, sensors.variance, field.process).posterior(field.denoise)(x, t)
        torch.testing.assert_close(field.process.mollifier(free.sharp), free.smooth)
        torch.testing.assert_close(observe(free.smooth), sensors.readings.expand(2, -1), atol=5e-3, rtol=0)
        assert not (free.smooth.requires_grad or free.noise.requires_grad or free.log_variance.requires_grad)
        kept = Measured(observe, 3 * sensors.readings, sensors.variance, field.process, clip=True)
        kept = kept.posterior(field.denoise)(x, t)
        assert kept.sharp.abs().max() == 1
        a, b = (field.process.schedule.at(f"sqrt_{name}alpha_bar", t, x) for name in ("", "one_minus_"))
        torch.testing.assert_close(a * kept.smooth + b * kept.noise, x)


def test_the_first_guess_is_smooth_and_passes_through_the_measurements():
    sensors = somewhere(9, channels=2)
    observe = sensors.observer(torch.device("cpu"))
    guess = smooth_guess(observe, sensors.readings, sensors.variance, 2, (20, 14))
    assert guess.shape == (1, 2, 20, 14) and guess.abs().max() < 3
    torch.testing.assert_close(observe(guess)[0], sensors.readings, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"places": [[0.5, 1.2]]}, r"sensor 1 is at y 0.5, x 1.2; accepted: places from 0 to 1"),
        ({"places": [[0.5, math.nan]]}, r"sensor 1 is at y 0.5, x nan"),
        ({"sides": [[0.0, 1.2]]}, r"sensor 1 is at y 0.5, x 0.5 over 0 by 1.2"),
        ({"sides": [[-0.1, 0.0]]}, r"sensor 1 is at .* over -0.1 by 0"),
        ({"values": [[math.inf]]}, r"values of sensors are infinite"),
        ({"values": [[math.nan]]}, r"measurements are none; accepted: at least one"),
        ({"values": [0.1]}, r"values of sensors have shape \(1,\); accepted: \(1, C\)"),
        ({"sd": -0.1}, r"sd of sensors is -0.1; accepted: 0 or more"),
        ({"sd": [math.nan]}, r"sd of sensors is nan"),
        ({"sd": [0.1, 0.1]}, r"sd of sensors is 0.1, 0.1"),
        ({"places": [[0.5, 0.5]] * 2, "values": [[0.1], [0.2]]}, r"sensors 1 and 2 are at one place"),
    ],
)
def test_wrong_sensors_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Sensors(**{"places": torch.tensor([[0.5, 0.5]]), "values": torch.tensor([[0.1]]), **given})


def test_sensors_at_one_place_are_fine_where_they_err_or_read_different_channels():
    places = torch.tensor([[0.5, 0.5]] * 2)
    Sensors(places, torch.tensor([[0.1], [0.2]]), torch.tensor([0.0, 0.1]))
    Sensors(places, torch.tensor([[0.1, math.nan], [math.nan, 0.2]]))


def test_wrong_measurements_are_named():
    process = process_of()
    for values, variance, message in (
        ([], [], "measurements are none"),
        ([math.nan], [0.1], "not all finite"),
        ([0.1], [-0.1], "from -0.1 to -0.1; accepted: one for each of the 1"),
        ([0.1], [math.nan], "from nan to nan"),
        ([0.1], [0.1, 0.1], r"variances are \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            Measured(lambda x: x, torch.tensor(values), torch.tensor(variance), process)
    with pytest.raises(ValueError, match="sharp is True"):
        Measured(lambda x: x, torch.tensor([0.1]), torch.tensor([0.1]), process, sharp=True)


def test_the_benchmark_finds_it_best_and_its_table_is_the_committed_one():
    rows = {row["method"]: row for row in gaussian_rows((10, 12), 16, "30")}
    ours = rows.pop("posterior")
    assert ours["mean_error"] < 0.02 and all(ours["mean_error"] < 0.5 * row["mean_error"] for row in rows.values())
    results = Path(__file__).parents[1] / "benchmarks/results"
    stored = json.loads((results / "posterior.json").read_text())
    assert table(stored["gaussian"]) + "\n" == (results / "posterior.txt").read_text()
    kriging = stored["gaussian"][0]
    assert kriging["mean_error"] < 0.02 and 0.95 < kriging["sd_ratio"] < 1.05
