"""Losses against torch.distributions, scipy and closed forms."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import interpolate

from diffusion.losses import (
    LOSSES,
    Objective,
    kl_gaussians,
    kl_standard_normal,
    l1,
    log_probability_8bit,
    min_snr_weight,
    mse,
    multiscale,
    variational_bound,
)
from diffusion.mollifier import IDENTITY, Mollifier
from diffusion.process import DiffusionProcess, Prediction, Variance
from diffusion.schedules import Schedule
from known_answers import process_of, seeded


def test_per_sample_means():
    a, b = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(mse(a, b), torch.stack([((a[i] - b[i]) ** 2).mean() for i in range(3)]))
    torch.testing.assert_close(l1(a, b), torch.stack([(a[i] - b[i]).abs().mean() for i in range(3)]))
    assert mse(torch.full((1, 9), 300.0).half(), torch.zeros(1, 9).half()).item() == 90000  # beyond float16


@pytest.mark.parametrize("schedule", ["cosine", "linear", "const0.008", "shifted_cosine"])
def test_min_snr_weights_are_those_of_the_paper(schedule):
    """Hang et al. 2023, eq. (9) and after it, in exact arithmetic of ᾱ; for ξ it is γ / SNR, at most 1."""
    noise = Schedule.create(schedule, 100, resolution=128)
    t = torch.arange(100)
    expected = {prediction: [] for prediction in Prediction}
    for alpha_bar in noise.alpha_bar.tolist():
        snr = alpha_bar / (1 - alpha_bar)
        expected[Prediction.X0].append(min(snr, 5.0))
        expected[Prediction.EPS].append(min(1.0, 5.0 / snr))
        expected[Prediction.MOLLIFIED_EPS].append(min(1.0, 5.0 / snr))
        expected[Prediction.V].append(min(snr, 5.0) / (snr + 1))
    for prediction, weights in expected.items():
        process = DiffusionProcess(noise, Mollifier(1.0, (8, 8)), prediction)
        found, wanted = min_snr_weight(process, t, 5.0), torch.tensor(weights, dtype=torch.float64)
        assert found.shape == (100,) and found.dtype == torch.float64
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(min_snr_weight(process, t, 5.0, "l1"), wanted.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("loss", "name"), [(mse, "mse"), (l1, "l1")])
def test_the_weighted_loss_of_an_error_in_x_0_is_the_same_for_all_predictions(loss, name):
    """Without T, where an error in x_0 at a fixed state is one of each predicted quantity: by `training_pair`."""
    generator = seeded()
    x_0, error, white = torch.randn(3, 6, 2, 5, 7, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 3, 20, 50, 90, 99])
    schedule, found = Schedule.create("cosine", 100), []
    for prediction in Prediction:
        process = DiffusionProcess(schedule, IDENTITY, prediction)
        x_t, target = process.training_pair(x_0, t, white)
        a = schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        other_white = (x_t - a.sqrt() * (x_0 + error)) / (1 - a).sqrt()  # that of x_0 + error in the same state
        wrong_state, wrong = process.training_pair(x_0 + error, t, other_white)
        torch.testing.assert_close(wrong_state, x_t)
        found.append(min_snr_weight(process, t, 5.0, name) * loss(wrong, target))
    snr = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    weight = snr.clamp(max=5) if name == "mse" else snr.clamp(max=5).sqrt()
    for values in found:
        torch.testing.assert_close(values, weight * loss(x_0 + error, x_0), rtol=1e-6, atol=1e-12)


def test_kl_divergences():
    mean1, mean2, log_variance1, log_variance2 = torch.randn(4, 3, 7, dtype=torch.float64)
    p, q = Normal(mean1, (0.5 * log_variance1).exp()), Normal(mean2, (0.5 * log_variance2).exp())
    torch.testing.assert_close(kl_gaussians(mean1, log_variance1, mean2, log_variance2), kl_divergence(p, q))
    standard = kl_divergence(p, Normal(torch.zeros_like(mean1), torch.ones_like(mean1))).sum(dim=1)
    torch.testing.assert_close(kl_standard_normal(mean1, log_variance1), standard)


def test_probabilities_of_grey_levels():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, std in ((0.1, 0.2), (-0.95, 0.05), (1.3, 0.5)):
        mass = log_probability_8bit(levels, torch.tensor(mean), torch.tensor(math.log(std))).exp()
        assert mass.sum() == pytest.approx(1)
        edges = (levels[:-1] + 1 / 255).numpy()
        below = torch.from_numpy(scipy.stats.norm.cdf(edges, mean, std))
        exact = torch.cat([below, below.new_ones(1)]) - torch.cat([below.new_zeros(1), below])
        torch.testing.assert_close(mass, exact, rtol=0, atol=4e-4)  # Page's approximation is good to 2e-4


@pytest.mark.parametrize("prediction", list(Prediction))
def test_variational_bound_is_the_divergence_of_both_reverse_steps(prediction):
    process = process_of(prediction, Variance.LEARNED_RANGE, sigma=0.0, steps=50)
    t = torch.tensor([1, 20, 49, 0])
    x_0 = torch.rand(4, 2, 5, 6, dtype=torch.float64) * 2 - 1
    x_t, target = process.training_pair(x_0, t, torch.randn_like(x_0))
    output = torch.cat([target + 0.1 * torch.randn_like(target), torch.rand_like(target) * 2 - 1], dim=1)
    denoised = process.denoise(output, x_t, t, clip=False)
    sigma = (0.5 * denoised.log_variance).exp()
    mean = process.posterior_mean(denoised.smooth, x_t, t)
    posterior = process.schedule.at("posterior_log_variance_clipped", t, x_0)
    true = Normal(process.posterior_mean(x_0, x_t, t), (0.5 * posterior).exp())
    expected = kl_divergence(true, Normal(mean, sigma)).mean(dim=(1, 2, 3))
    expected[3] = -log_probability_8bit(x_0[3], mean[3], sigma[3].log()).mean()
    bound = variational_bound(process, output[:, :2], denoised.log_variance, target, x_0, t)
    torch.testing.assert_close(bound, expected / math.log(2))


@pytest.mark.parametrize("prediction", list(Prediction))
def test_variational_bound_is_pointwise(prediction):
    """The bound of an image is the bound of its pixels as points, with a mollifier too."""
    process = process_of(prediction, Variance.LEARNED, size=(5, 6), steps=50)
    t = torch.tensor([3, 0])
    x_0 = torch.rand(2, 2, 5, 6) * 2 - 1
    _, target = process.training_pair(x_0, t, torch.randn_like(x_0))
    image = [target + 0.1, torch.randn_like(x_0), target, x_0]
    points = [x.flatten(2).transpose(1, 2) for x in image]
    torch.testing.assert_close(variational_bound(process, *image, t), variational_bound(process, *points, t))


def test_variational_bound_is_least_at_the_true_variance():
    """Without an error of the mean, the posterior variance is optimal, and the bound is zero."""
    process = process_of(Prediction.EPS, Variance.LEARNED, sigma=0.0, steps=50)
    t = torch.tensor([7])
    target = torch.randn(1, 9)
    raw = torch.full((1, 9), math.log(process.schedule.posterior_variance[7]), requires_grad=True)
    bound = variational_bound(process, target, process.log_variance(raw, t, target), target, target, t)
    bound.sum().backward()
    assert bound.item() == pytest.approx(0, abs=1e-6)
    assert raw.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
def test_objective_is_weighted_loss_and_bound_in_any_layout(loss):
    """With an error of 1/2 everywhere: 1/4 or 1/2 times the weight of the step, and no gradient to the mean from the
    bound."""
    process = process_of(Prediction.EPS, Variance.LEARNED, size=(5, 6), steps=50)
    t = torch.tensor([3, 40])
    x_0, target, raw = torch.randn(3, 2, 2, 5, 6)
    output = torch.cat([target + 0.5, raw], dim=1).requires_grad_()
    objective = Objective(process, loss, "min_snr", 1.0)
    base, bound = objective(output, target, x_0, t)
    snr = process.schedule.alpha_bar[t] / (1 - process.schedule.alpha_bar[t])
    weight = (snr.clamp(max=1) / snr).float()
    torch.testing.assert_close(base, 0.25 * weight if loss == "mse" else 0.5 * weight.sqrt())
    (gradient,) = torch.autograd.grad(bound.sum(), output)
    assert not gradient[:, :2].any() and gradient[:, 2:].all()
    points = [x.flatten(2).transpose(1, 2) for x in (output, target, x_0)]
    torch.testing.assert_close(objective(*points, t, axis=2), (base, bound))
    fixed = Objective(replace(process, variance=Variance.FIXED_SMALL), loss, "none", 1.0)
    error = fixed(target + 0.5, target, x_0, t)
    torch.testing.assert_close(error, (torch.full((2,), 0.25 if loss == "mse" else 0.5), torch.zeros(2)))


def as_grid(side):
    return lambda x: interpolate(x, size=(side, side), mode="nearest")


def test_multiscale_of_a_constant_error_counts_every_level_once():
    """A constant is no smaller after pooling: 1/256 + 1/128 + 1/64 + 1/32 whatever the grid."""
    prediction, target = torch.full((2, 3, 256, 256), 1.5), torch.ones(2, 3, 256, 256)
    for loss, error in ((mse, 0.25), (l1, 0.5)):
        for side, levels in ((256, (256, 128, 64, 32)), (128, (256, 128, 64, 32)), (64, (256, 64, 32)), (16, (256,))):
            value = multiscale(loss, prediction, target, as_grid(side), side, 256)
            assert value.tolist() == pytest.approx([error * sum(1 / level for level in levels)] * 2)


def test_multiscale_forgives_what_pooling_removes():
    target = torch.zeros(1, 1, 64, 64)
    chequered = torch.ones(64, 64)
    chequered[::2, ::2] = chequered[1::2, 1::2] = -1
    value = multiscale(mse, chequered[None, None], target, as_grid(64), 64, 64)
    assert value.item() == pytest.approx(1 / 64)


def test_multiscale_takes_points_and_passes_gradients():
    values = torch.randn(2, 50, 3, requires_grad=True)

    def to_grid(x):
        return x.mean(dim=1)[:, :, None, None].expand(-1, -1, 64, 64)

    multiscale(mse, values, torch.zeros_like(values), to_grid, 64, 128).sum().backward()
    mean = values.detach().mean(dim=1, keepdim=True)
    expected = (2 * values.detach() / 128 + 2 * mean * (1 / 64 + 1 / 32)) / 150
    torch.testing.assert_close(values.grad, expected)
