"""How the samplers call their denoiser, noise and callback. That they sample the right law is shown in
test_closed_form."""

from functools import partial

import pytest
import torch

from diffusion.mollifier import IDENTITY
from diffusion.process import Denoised, DiffusionProcess, Prediction, Variance
from diffusion.samplers import ancestral, ancestral_step, ddim, ddim_invert
from known_answers import knows_the_image, process_of, seeded

PROCESS = process_of().respaced("7")


def white_source(shape, calls, **kind):
    def noise():
        calls.append(None)
        return torch.randn(shape, **kind)

    return noise


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 5, 11), (2, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_every_sampler_finds_the_only_image(shape, dtype):
    smooth, x = torch.randn(2, *shape).to(dtype)
    denoise = knows_the_image(PROCESS, smooth)
    calls = []
    noise = white_source(shape, calls, dtype=dtype)
    for result in (
        ancestral(denoise, x, PROCESS, noise=noise),
        ddim(denoise, x, PROCESS),
        ddim(denoise, x, PROCESS, eta=1.0, noise=noise),
        ddim(denoise, x, PROCESS, start=3),
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(result, smooth, rtol=2e-3, atol=2e-3)
    assert len(calls) == 6 + 6  # none at the last step


def test_inversion_reaches_the_noise_of_the_only_image():
    """For one image every state on the way has the eps of the first, so that inversion is exact."""
    smooth, eps = torch.randn(2, 1, 2, 6, 9, dtype=torch.float64)
    schedule = PROCESS.schedule
    start = schedule.alpha_bar[0].sqrt() * smooth + (1 - schedule.alpha_bar[0]).sqrt() * eps
    for stop in (0, 4, 6):
        code = ddim_invert(knows_the_image(PROCESS, smooth), start, PROCESS, stop=stop)
        expected = schedule.alpha_bar[stop].sqrt() * smooth + (1 - schedule.alpha_bar[stop]).sqrt() * eps
        torch.testing.assert_close(code, expected)


def test_steps_are_visited_in_order_and_reported():
    smooth, x = torch.zeros(2, 3, 1, 4, 4)
    seen, reported = [], []
    inner = knows_the_image(PROCESS, smooth)

    def denoise(x_t, t):
        assert t.dtype == torch.int64 and t.shape == (3,) and (t == t[0]).all()
        seen.append(int(t[0]))
        return inner(x_t, t)

    def callback(i, t, state, denoised):
        reported.append((i, t))
        assert state.shape == denoised.smooth.shape

    ancestral(denoise, x, PROCESS, noise=lambda: torch.zeros_like(x), callback=callback)
    ddim(denoise, x, PROCESS, start=2, callback=callback)
    ddim_invert(denoise, x, PROCESS, stop=3, callback=callback)
    assert seen == [6, 5, 4, 3, 2, 1, 0, 2, 1, 0, 0, 1, 2]  # the whole chain, from step 2, and up to step 3
    assert reported == list(zip([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 2], seen))


def test_eta_one_is_the_ancestral_sampler():
    """DDIM with η = 1 has the posterior's variance and mean, whatever the network says."""
    process = DiffusionProcess(PROCESS.schedule, IDENTITY, Prediction.EPS, Variance.FIXED_SMALL)
    denoise = process.denoiser(lambda x, time: torch.sin(3 * x) * torch.cos(time / 300)[:, None], clip=False)
    x = torch.randn(2, 40, dtype=torch.float64)
    results = []
    for sampler in (ancestral, partial(ddim, eta=1.0)):
        noise = partial(torch.randn, x.shape, generator=seeded(), dtype=torch.float64)
        results.append(sampler(denoise, x, process, noise=noise))
    torch.testing.assert_close(*results)


def test_learned_standard_deviation_multiplies_the_mollified_noise():
    """The covariance of a step is diag(σ) T Tᵗ diag(σ)."""
    process = DiffusionProcess(PROCESS.schedule, PROCESS.mollifier, Prediction.MOLLIFIED_EPS, Variance.LEARNED)
    log_variance = torch.randn(2, 1, 4, 6, dtype=torch.float64)
    zero = torch.zeros(2, 1, 4, 6, dtype=torch.float64)
    noise = process.mollifier.noise(torch.randn_like(zero))
    t = torch.tensor([5, 0])
    step = ancestral_step(process, Denoised(zero, zero, log_variance), zero, t, noise)
    torch.testing.assert_close(step[0], (0.5 * log_variance[0]).exp() * noise[0])
    assert torch.equal(step[1], zero[1])


def test_gradients_pass_through_a_sampler():
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    process = DiffusionProcess(PROCESS.schedule, PROCESS.mollifier, Prediction.X0)
    ddim(process.denoiser(lambda x, time: torch.tanh(x), clip=True), x, process).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: ddim(f, x, PROCESS, eta=-0.1), "eta is -0.1"),
        (lambda f, x: ddim(f, x, PROCESS, eta=0.5), "noise is None"),
        (lambda f, x: ancestral(f, x, PROCESS), "noise is None"),
        (lambda f, x: ddim(f, x, PROCESS, start=7), "start is 7; accepted: 0 to 6"),
        (lambda f, x: ddim_invert(f, x, PROCESS, stop=-1), "stop is -1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(knows_the_image(PROCESS, torch.zeros(1, 4)), torch.zeros(1, 4))
