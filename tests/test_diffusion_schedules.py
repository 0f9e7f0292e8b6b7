"""Schedules against closed forms, and the posterior against Bayes' rule evaluated on a grid."""

import math

import pytest
import torch

from diffusion.schedules import Schedule, make_betas, space_timesteps


def test_linear_schedule():
    betas = make_betas("linear", 500)
    torch.testing.assert_close(
        betas, torch.tensor([0.1 + 19.9 * i / 499 for i in range(500)], dtype=torch.float64) / 500
    )


def test_constant_schedule():
    assert make_betas("const0.008", 250).tolist() == pytest.approx([0.032] * 250)


@pytest.mark.parametrize(("name", "shift"), [("cosine", 1.0), ("shifted_cosine", (64 / 256) ** 2)])
def test_cosine_schedules_have_their_signal_to_noise_ratio(name, shift):
    """SNR = cot² of an angle, shifted by (64 / resolution)²; alpha_bar is relative to its value at time 0."""
    schedule = Schedule.create(name, 200, 256)

    def alpha_bar(u):
        ratio = shift / math.tan((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return ratio / (1 + ratio)

    expected = [alpha_bar((t + 1) / 200) / alpha_bar(0) for t in range(199)]
    assert schedule.alpha_bar[:199].tolist() == pytest.approx(expected, rel=1e-9)
    assert schedule.betas[-1] == 0.999


@pytest.mark.parametrize("kept", ["10", "ddim50", "3,7,12", [0, 4, 5, 199]])
def test_respacing_keeps_the_noise_levels(kept):
    schedule = Schedule.create("cosine", 200)
    short = schedule.respace(kept)
    torch.testing.assert_close(short.alpha_bar, schedule.alpha_bar[short.timestep_map])
    assert short.original_steps == 200
    again = short.respace([0, short.num_steps - 1])
    assert again.timestep_map.tolist() == [short.timestep_map[0], short.timestep_map[-1]]


def test_step_specs():
    assert space_timesteps(10, "10") == list(range(10))
    assert space_timesteps(10, "2") == [0, 9]
    assert space_timesteps(10, "1") == [0]
    assert space_timesteps(10, "ddim5") == [0, 2, 4, 6, 8]
    assert space_timesteps(11, "2,3") == [0, 5, 6, 8, 10]  # sections of 6 and 5
    kept = space_timesteps(1000, "100")
    assert len(kept) == 100 and kept[0] == 0 and kept[-1] == 999 and kept == sorted(set(kept))


@pytest.mark.parametrize("spec", ["", "ddim", "ddim0", "0", "-3", "1.5", "11", "6,6", "ddim7", "a"])
def test_impossible_specs_are_refused(spec):
    with pytest.raises(ValueError, match="sampling steps"):
        space_timesteps(10, spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_betas("cosin", 10), "cosin"),
        (lambda: make_betas("constant", 10), "const0.008"),
        (lambda: make_betas("const2", 10), r"variances in \(0, 1\)"),
        (lambda: make_betas("linear", 10), r"variances in \(0, 1\)"),
        (lambda: make_betas("cosine", 0), "steps is 0"),
        (lambda: make_betas("shifted_cosine", 10), "resolution"),
        (lambda: Schedule.create("cosine", 10).respace([]), "at least one"),
        (lambda: Schedule.create("cosine", 10).respace([0, 10]), "0 to 9"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["cosine", "linear", "const0.008"])
@pytest.mark.parametrize("t", [1, 40, 98])
def test_posterior_is_bayes_rule(name, t):
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0) in one dimension, integrated numerically."""
    schedule = Schedule.create(name, 100)
    alpha_bar, before, beta = (float(v[t]) for v in (schedule.alpha_bar, schedule.alpha_bar_prev, schedule.betas))
    x_0, x_t = 0.7, -0.4
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    log_prior = -((x - math.sqrt(before) * x_0) ** 2) / (2 * (1 - before))
    log_step = -((x_t - math.sqrt(1 - beta) * x) ** 2) / (2 * beta)
    weights = torch.softmax(log_prior + log_step, dim=0)
    mean = float((weights * x).sum())
    variance = float((weights * (x - mean) ** 2).sum())
    assert float(schedule.posterior_mean_coef1[t] * x_0 + schedule.posterior_mean_coef2[t] * x_t) == pytest.approx(mean)
    assert float(schedule.posterior_variance[t]) == pytest.approx(variance, rel=1e-6)
    assert alpha_bar == pytest.approx(before * (1 - beta))


def test_lookup_is_rounded_last_and_shaped_to_multiply():
    schedule = Schedule.create("cosine", 1000)
    t = torch.tensor([0, 500, 999])
    for dtype, expected in (
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        value = schedule.at("sqrt_alpha_bar", t, torch.zeros(3, 2, 4, 5, dtype=dtype))
        assert value.shape == (3, 1, 1, 1) and value.dtype == expected
        assert torch.equal(value.flatten(), schedule.alpha_bar[t].sqrt().to(expected))
    assert schedule.at("betas", t, torch.zeros(3, 7)).shape == (3, 1)


def test_network_time_is_that_of_training():
    schedule = Schedule.create("cosine", 250).respace("ddim5")
    assert schedule.network_time(torch.tensor([0, 1, 4])).tolist() == [0.0, 200.0, 800.0]


def test_single_step_process_has_finite_tables():
    schedule = Schedule.create("cosine", 1000).respace([900])
    assert schedule.num_steps == 1
    for table in ("posterior_log_variance_clipped", "fixed_large_log_variance", "posterior_mean_coef2"):
        assert torch.isfinite(getattr(schedule, table)).all()
