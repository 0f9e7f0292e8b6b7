"""The process with a perfect predictor, which must return the state's own T x_0 and Tξ whatever it is asked to
predict."""

import math

import pytest
import torch

from diffusion.mollifier import IDENTITY, Mollifier
from diffusion.process import DiffusionProcess, Prediction, Variance
from diffusion.schedules import Schedule

SCHEDULE = Schedule.create("cosine", 100)
T = torch.tensor([0, 30, 97])


def smooth_problem(size=(10, 14), dtype=torch.float64):
    x_0 = torch.rand(3, 2, *size, dtype=dtype) * 2 - 1
    return x_0, torch.randn_like(x_0)


@pytest.mark.parametrize("size", [(10, 14), (8, 8), (5, 20)])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_a_perfect_prediction_returns_what_the_state_is_made_of(prediction, sigma, size):
    mollifier = Mollifier(sigma, (8, 8))
    process = DiffusionProcess(SCHEDULE, mollifier, prediction)
    x_0, white = smooth_problem(size)
    x_t, target = process.training_pair(x_0, T, white)
    denoised = process.denoise(target, x_t, T, clip=False)
    torch.testing.assert_close(x_t, process.q_sample(x_0, T, white))
    torch.testing.assert_close(denoised.smooth, mollifier(x_0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoised.noise, mollifier.noise(white), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_vectors(prediction):
    process = DiffusionProcess(SCHEDULE, IDENTITY, prediction)
    x_0, white = torch.randn(2, 3, 24, dtype=torch.float64)
    x_t, target = process.training_pair(x_0, T, white)
    assert x_t.shape == target.shape == (3, 24)
    torch.testing.assert_close(process.denoise(target, x_t, T, clip=False).smooth, x_0, rtol=1e-6, atol=1e-6)


def test_forward_process_is_equation_11():
    mollifier = Mollifier(1.0, (8, 8))
    process = DiffusionProcess(SCHEDULE, mollifier, Prediction.MOLLIFIED_EPS)
    x_0, white = smooth_problem((16, 24))
    x_t = process.q_sample(x_0, T, white)
    for b, t in enumerate(T.tolist()):
        alpha_bar = math.cos((t + 1) / 100 / 1.008 * math.pi / 2 + 0.008 / 1.008 * math.pi / 2) ** 2
        alpha_bar /= math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        scale = math.sqrt(16 * 24 / 64)
        expected = math.sqrt(alpha_bar) * mollifier(x_0[b]) + math.sqrt(1 - alpha_bar) * scale * mollifier(white[b])
        torch.testing.assert_close(x_t[b], expected)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_clipped_estimates_stay_consistent_with_the_state(prediction, sigma):
    mollifier = Mollifier(sigma, (8, 8))
    process = DiffusionProcess(SCHEDULE, mollifier, prediction)
    x_t, output = torch.randn(2, 3, 2, 9, 12, dtype=torch.float64) * 3
    denoised = process.denoise(output, x_t, T, clip=True)
    alpha_bar = SCHEDULE.alpha_bar[T].view(3, 1, 1, 1)
    torch.testing.assert_close(alpha_bar.sqrt() * denoised.smooth + (1 - alpha_bar).sqrt() * denoised.noise, x_t)
    assert denoised.smooth.abs().max() <= 1 + 1e-9
    if prediction is Prediction.X0:
        torch.testing.assert_close(denoised.smooth, mollifier(output.clamp(-1, 1)))


def test_posterior_mean_is_the_kept_state_of_a_noiseless_problem():
    """With Tξ = 0 the posterior mean of x_{t-1} is √ᾱ_{t-1} T x_0, plus its share of the state's own noise, here
    none."""
    process = DiffusionProcess(SCHEDULE, Mollifier(1.0, (8, 8)), Prediction.MOLLIFIED_EPS)
    smooth = process.mollifier(smooth_problem()[0])
    x_t = SCHEDULE.alpha_bar[T].sqrt().view(3, 1, 1, 1) * smooth
    expected = SCHEDULE.alpha_bar_prev[T].sqrt().view(3, 1, 1, 1) * smooth
    torch.testing.assert_close(process.posterior_mean(smooth, x_t, T), expected)


def test_fixed_variances():
    x_t = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    for variance, table in (
        (Variance.FIXED_LARGE, SCHEDULE.betas),
        (Variance.FIXED_SMALL, SCHEDULE.posterior_variance),
    ):
        process = DiffusionProcess(SCHEDULE, IDENTITY, Prediction.EPS, variance)
        log_variance = process.denoise(x_t, x_t, T, clip=False).log_variance
        assert log_variance.shape == (3, 1, 1, 1)
        torch.testing.assert_close(log_variance.exp().flatten()[1:], table[T][1:])
        torch.testing.assert_close(log_variance.exp().flatten()[0], SCHEDULE.posterior_variance[1])


def test_learned_variances():
    prediction, raw = torch.randn(2, 3, 2, 4, 6, dtype=torch.float64)
    x_t = torch.randn_like(prediction)
    output = torch.cat([prediction, raw], dim=1)
    plain = DiffusionProcess(SCHEDULE, IDENTITY, Prediction.EPS).denoise(prediction, x_t, T, clip=False)
    learned = DiffusionProcess(SCHEDULE, IDENTITY, Prediction.EPS, Variance.LEARNED).denoise(output, x_t, T, clip=False)
    torch.testing.assert_close(learned.smooth, plain.smooth)
    torch.testing.assert_close(learned.log_variance, raw)
    ranged = DiffusionProcess(SCHEDULE, IDENTITY, Prediction.EPS, Variance.LEARNED_RANGE)
    for position, table in ((-1.0, SCHEDULE.posterior_variance), (1.0, SCHEDULE.betas)):
        ends = ranged.log_variance(torch.full_like(x_t, position), T, x_t)
        torch.testing.assert_close(ends.exp()[1:], table[T][1:].view(-1, 1, 1, 1).expand_as(x_t[1:]))
    middle = ranged.log_variance(torch.zeros_like(x_t), T, x_t)[1, 0, 0, 0].exp()
    torch.testing.assert_close(middle, (SCHEDULE.posterior_variance[30] * SCHEDULE.betas[30]).sqrt())


def test_output_is_split_along_the_named_axis():
    process = DiffusionProcess(SCHEDULE, IDENTITY, Prediction.EPS, Variance.LEARNED)
    points = torch.arange(12.0).reshape(1, 2, 6)
    prediction, raw = process.split(points, axis=-1)
    assert torch.equal(prediction, points[..., :3]) and torch.equal(raw, points[..., 3:])
    with pytest.raises(ValueError, match="3 channels"):
        process.split(torch.zeros(1, 3, 2, 2), axis=1)
    fixed = DiffusionProcess(SCHEDULE, IDENTITY, Prediction.EPS)
    assert fixed.split(points, axis=-1) == (points, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", list(Prediction))
def test_dtypes_are_kept(prediction, dtype):
    process = DiffusionProcess(SCHEDULE, Mollifier(1.0, (8, 8)), prediction)
    x_0, white = smooth_problem(dtype=dtype)
    x_t, target = process.training_pair(x_0, T, white)
    denoised = process.denoise(target, x_t, T, clip=True)
    mean = process.posterior_mean(denoised.smooth, x_t, T)
    assert {x_t.dtype, target.dtype, denoised.smooth.dtype, denoised.noise.dtype, mean.dtype} == {dtype}
    assert process.q_sample(x_0, T, white).dtype == dtype


def test_denoiser_passes_the_time_of_training():
    process = DiffusionProcess(Schedule.create("cosine", 500), IDENTITY, Prediction.EPS).respaced([10, 400])
    times = []

    def network(x, time):
        times.append(time)
        return torch.zeros_like(x)

    denoised = process.denoiser(network, clip=False)(torch.ones(2, 5), torch.tensor([1, 0]))
    assert times[0].tolist() == [800.0, 20.0]
    torch.testing.assert_close(denoised.smooth[0], 1 / process.schedule.alpha_bar[1].sqrt().float().expand(5))


def test_config_names_are_the_published_ones():
    assert {p.value for p in Prediction} == {"mollified_epsilon", "xstart", "epsilon", "v"}
    assert {v.value for v in Variance} == {"fixed_large", "fixed_small", "learned", "learned_range"}
