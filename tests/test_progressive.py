"""Samplers whose lattice grows: on Gaussian fields they are the samplers they are made of, by closed form."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffusion.coordinates import Size
from diffusion.mollifier import Mollifier
from diffusion.noise import function_noise
from diffusion.process import Denoised, Denoiser, DiffusionProcess, Prediction, Variance
from diffusion.progressive import lattices, progressive
from diffusion.random import Purpose, key
from diffusion.samplers import ancestral, ddim, dpmpp
from diffusion.spectrum import Spectrum, measure_spectrum
from forked import run
from infty_diff.editing import InpaintOptions
from infty_diff.growing import stored_spectrum
from infty_diff.model import InftyDiff, SamplingOptions
from known_answers import TRAIN_SIZE, coefficients, image, process_of, seeded
from runtime.stored import read_header
from test_generation import build, stored
from test_which_weights import sampling

SIZES = [(32, 32), (20, 44), (13, 6), (11, 9)]  # trained at 8×8: four times it; not square; one axis smaller; nearly it
POWER = Spectrum(0.25, (0.5, 0.2, 0.08, 0.04, 0.03), 2.5)


def make(steps: str, sigma: float = 1.0, **kinds) -> DiffusionProcess:
    return process_of(sigma=sigma, **kinds).respaced(steps)


def best_denoiser(process: DiffusionProcess, asked: list[Size] | None = None) -> Denoiser:
    """E[T x_0 | x_t] of a Gaussian field of the power POWER; notes the sizes of the states that it sees."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Denoised:
        k, l = (np.arange(n) / own for n, own in zip(x_t.shape[-2:], TRAIN_SIZE))  # noqa: E741
        c = POWER.at(torch.from_numpy(np.hypot(k[:, None], l[None]))).numpy()
        if asked is not None:
            asked.append(tuple(x_t.shape[-2:]))
        alpha_bar = float(process.schedule.alpha_bar[t[0]])
        a, b = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        smooth = image(a * c / (alpha_bar * c + b**2) * coefficients(x_t))
        return Denoised(smooth, (x_t - a * smooth) / b, process.log_variance(None, t, x_t))

    return denoise


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("sampler", "steps"), [(ddim, "25"), (dpmpp, "logsnr12"), (ancestral, "12")], ids=["ddim", "dpmpp", "ddpm"]
)
def test_on_gaussian_fields_it_is_the_full_sampler_and_the_one_at_the_training_size(sampler, steps, size):
    """Whatever δ and the row of lattices; and its low waves are those of the same seed at 8×8."""
    process, keys = make(steps), [key(seed, Purpose.IMAGE) for seed in (0, 1)]
    at_training = tuple(map(min, size, TRAIN_SIZE))

    def draw(denoise: Denoiser, own: Size) -> torch.Tensor:
        calls = iter(range(100))

        def white(seed_of_call: int) -> torch.Tensor:
            drawn = [(*k[:2], k[2] ^ seed_of_call) for k in keys]
            return process.mollifier.noise(function_noise(drawn, 1, own).double())

        return sampler(denoise, white(0), process, noise=lambda: white(1 + next(calls)))

    full = draw(best_denoiser(process), size)
    for delta, growth in ((0.05, 1.25), (0.5, math.inf), (1e-3, 2.0)):
        asked: list[Size] = []
        denoise = progressive(best_denoiser(process, asked), process, POWER, size, delta, growth)
        torch.testing.assert_close(draw(denoise, size), full, rtol=0, atol=1e-10)
        assert asked[0] == at_training and asked[-1] == size
        assert asked == lattices(process, POWER, size, delta, growth)[::-1]
    small = draw(best_denoiser(process), at_training)
    h, w = at_training
    low = coefficients(full)[..., :h, :w] * math.sqrt(h * w / math.prod(size))
    np.testing.assert_allclose(low, coefficients(small), atol=2e-5)


@pytest.mark.parametrize("size", [(32, 32), (20, 44), (13, 6)])
def test_power_of_the_waves_that_are_not_asked_for(size):
    """It is b² + a² c up to the length of the steps. As noise of power b² it would lack a part of at most δ/(1 + δ)."""
    delta, sigma = 0.1, 0.1  # so little smoothing hides no wave
    k, l = (np.arange(n)[:, None] / own for n, own in zip(size, TRAIN_SIZE))  # noqa: E741
    c = POWER.at(torch.from_numpy(np.hypot(k, l.T))).numpy()
    gain = np.exp(-0.5 * (math.pi * sigma) ** 2 * (k**2 + l.T**2))
    errors, lacking = [], []
    for steps in (40, 160):
        process = make(str(steps), sigma)
        by_step = lattices(process, POWER, size, delta)
        states: dict[int, torch.Tensor] = {}
        denoise = progressive(best_denoiser(process), process, POWER, size, delta)
        start = process.mollifier.noise(image(np.ones((1, 1, *size))))
        ddim(denoise, start, process, callback=lambda i, t, x, denoised: states.update({t - 1: x}))  # noqa: B023
        errors.append(0.0)
        for t in range(steps - 1):
            h, w = by_step[t]
            missing = np.ones(size, dtype=bool)
            missing[:h, :w] = False
            alpha_bar = float(process.schedule.alpha_bar[t])
            power = (alpha_bar * c + 1 - alpha_bar)[missing]
            actual = (coefficients(states[t])[0, 0] / gain)[missing] ** 2 / process.mollifier.noise_scale(size) ** 2
            errors[-1] = max(errors[-1], np.abs(actual / power - 1).max(initial=0))
            lacking.append((1 - (1 - alpha_bar) / power).max(initial=0))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.05 * delta
    assert 0.8 * delta / (1 + delta) < max(lacking) <= delta / (1 + delta)


@pytest.mark.parametrize("size", [(128, 128), (80, 52), (33, 47), (100, 20), (32, 32), (16, 24)])
def test_lattices(size):
    """From the training resolution to all pixels, each the first of its row that holds what is asked for."""
    process = process_of(size=(32, 32)).respaced("50")
    for delta, growth in ((0.0, 1.25), (0.01, 1.25), (0.2, 2.0), (0.2, math.inf)):
        found = lattices(process, POWER, size, delta, growth)
        assert found[0] == size and all(a[0] >= b[0] and a[1] >= b[1] for a, b in pairwise(found))
        start = min(size[0], 32), min(size[1], 32)
        assert set(found[1:]) <= {start, size} if growth == math.inf else delta == 0 or found[-1] == start
        for t, (h, w) in enumerate(found[1:], 1):
            ratio = float(process.schedule.alpha_bar[t] / (1 - process.schedule.alpha_bar[t]))
            f = np.hypot(np.arange(size[0])[:, None] / 32, np.arange(size[1]) / 32)
            seen = (ratio * POWER.at(torch.from_numpy(f)).numpy() > delta) & (np.exp(-0.5 * (np.pi * f) ** 2) >= 1e-6)
            assert not seen[h:].any() and not seen[:, w:].any()
    assert set(lattices(process, POWER, (16, 24), 0.05)) == {(16, 24)}
    assert lattices(process, POWER, (128, 128), 0.05)[1] == (64, 64)  # T hides what is finer


def test_learned_variances_guidance_and_half_precision():
    """Whatever a denoiser returns has the size of the state; what comes from the small lattice is read between its
    pixels."""
    size, process = (24, 20), make("6", variance=Variance.LEARNED_RANGE, prediction=Prediction.X0)
    wave = torch.cos(math.pi * (torch.arange(8) + 0.5) / 8)[:, None].expand(8, 8)  # a function that both lattices hold
    finer = torch.cos(math.pi * (torch.arange(24) + 0.5) / 24)[:, None].expand(size)

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        picture = (wave if x.shape[-2:] == (8, 8) else finer).to(x) + 0 * x
        return torch.cat([picture, 0.5 * picture], dim=1)

    plain = process.denoiser(network, clip=False)
    denoise = progressive(plain, process, Spectrum(1.0, (1e-9,), 0.0), size, 0.05)
    white, t = torch.randn(2, 1, *size, generator=seeded()), torch.tensor([3, 3])
    for dtype, error in ((torch.float32, 1e-5), (torch.float16, 0.03)):
        x = process.mollifier.noise(white).to(dtype).requires_grad_()
        found, expected = denoise(x, t), plain(x, t)
        for name in ("smooth", "noise", "log_variance", "sharp"):
            actual, wanted = getattr(found, name), getattr(expected, name)
            assert actual.shape == wanted.shape and (name == "log_variance" or actual.dtype == dtype)
            torch.testing.assert_close(actual.double(), wanted.double(), rtol=0, atol=error)
        found.noise.float().square().sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def fields(size: Size, count: int, power) -> torch.Tensor:
    k, l = (np.arange(n) / n for n in size)  # noqa: E741
    deviation = np.sqrt(power(np.hypot(k[:, None], l[None])))
    return image(deviation * np.random.default_rng(0).standard_normal((count, 2, *size)))


@pytest.mark.parametrize("size", [(16, 16), (24, 14), (9, 33)])
def test_the_spectrum_of_fields(size):
    """A law of powers, on and beyond the training band; images that are not finite do not count."""
    found = measure_spectrum(iter(fields(size, 400, lambda f: 0.1 / (0.05 + f) ** 3).split(150)), Mollifier(1.0, size))
    assert found.decay == pytest.approx(2.8, abs=0.15)  # the slope of (0.05 + f)^-3 about f = 0.75
    for frequency in (0.5, 0.9, 2.0, 4.0):
        expected = 0.1 / (0.05 + frequency) ** 3
        assert float(found.at(torch.tensor(frequency))) == pytest.approx(expected, rel=0.15 if frequency < 1 else 0.4)
    images = torch.randn(3, 1, 4, 4)
    images[1, 0, 2, 2] = math.nan
    whole = measure_spectrum([images[[0, 2]]], Mollifier(1.0, (4, 4)))
    assert measure_spectrum([images], Mollifier(1.0, (4, 4))) == whole


@pytest.mark.parametrize("broken", [3, {"spacing": 1}, {"spacing": 0.5, "values": ["x"], "decay": 2}, {"values": 2}])
def test_a_broken_spectrum_in_a_header_is_named(broken):
    with pytest.raises(ValueError, match=r"a\.safetensors has no spectrum .*accepted"):
        stored_spectrum({"spectrum": broken}, "a.safetensors")


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: Spectrum(0.5, (1.0, 0.0), 2.0), "values are (1.0, 0.0)"),
        (lambda: Spectrum(0.5, (1.0,), -1.0), "decay is -1.0"),
        (lambda: measure_spectrum([torch.full((2, 1, 8, 8), math.nan)], Mollifier(1.0, (8, 8))), "no image is finite"),
        (lambda: measure_spectrum([torch.zeros(1, 1, 8, 9)], Mollifier(1.0, (8, 8))), "images are (1, 1, 8, 9)"),
        (lambda: measure_spectrum([], Mollifier(0.0, (8, 8))), "mollifier is 'dct' with sigma 0"),
        (lambda: measure_spectrum([], Mollifier(1.0, (8, 8), "conv")), "mollifier is 'conv'"),
        (lambda: lattices(make("4", 0.0), POWER, (16, 16), 0.05), "mollifier is 'dct' with sigma 0"),
        (lambda: lattices(make("4"), POWER, (16, 16), -0.1), "delta is -0.1"),
        (lambda: lattices(make("4"), POWER, (16, 16), 0.05, growth=1.0), "growth 1.0"),
    ],
)
def test_bad_arguments_are_named(make_bad, message):
    with pytest.raises(ValueError, match=f"{re.escape(message)}.*accepted"):
        make_bad()


FAST = SamplingOptions(4, "progressive")


def test_a_model_draws_on_it(tmp_path):
    """At the training size it is DDIM; above, gradients and corrections pass; the same images whatever is known."""
    model = build(tmp_path)
    at_training = [
        model.sample([3], None, SamplingOptions(4, name), latent_steps="4") for name in ("ddim", "progressive")
    ]
    assert torch.equal(*at_training)
    picture = model.sample([3], (32, 30), FAST, latent_steps="4")
    mask = torch.ones(32, 30, dtype=torch.bool)
    mask[8:20, 5:20] = False
    filled = model.inpaint(picture.clamp(-1, 1), mask, options=InpaintOptions(FAST))
    assert filled.shape == (1, 3, 32, 30) and filled.isfinite().all()
    assert model.in_full_precision().spectrum == model.spectrum is not None
    white = build(tmp_path, {"diffusion.gaussian_filter_std": 0.0})
    with pytest.raises(ValueError, match=r"mollifier is 'dct' with sigma 0.*accepted"):
        white.sample([3], (32, 30), FAST, latent_steps="4")
    white.save(tmp_path / "white")  # there is no spectrum to store
    assert "spectrum" not in read_header(tmp_path / "white" / "image.safetensors")


def test_the_spectrum_is_stored_with_the_weights(tmp_path):
    """Saved ones have it; without, it is measured on the data, or a line says what is missing."""
    model, data = stored(tmp_path), {"name": "folder", "root_dir": str(tmp_path / "gone")}
    assert model.spectrum is None
    model.save(tmp_path / "saved")
    saved = InftyDiff.from_runs(tmp_path / "saved", device="cpu")
    assert saved.spectrum == model.spectrum == model.data_spectrum()
    for known in (model, saved):
        known.config = replace(known.config, data=replace(known.config.data, **data))
    saved.data_spectrum()
    model.spectrum = None
    with pytest.raises(
        ValueError, match=r"no spectrum of their data, and it cannot be measured: .*gone.*accepted"
    ) as error:
        model.provenance(FAST)
    assert "\n" not in str(error.value)


def test_the_command_records_what_it_drew_with(tmp_path):
    stored(tmp_path)
    done = run(sampling(tmp_path, "--sampler=progressive", "--sample_img_size=40x20", f"--out_dir={tmp_path / 'out'}"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["sampling"]["sampler"] == "progressive" and len(manifest["model"]["spectrum"]) == 64
    assert (tmp_path / "out" / "000000.png").exists()
