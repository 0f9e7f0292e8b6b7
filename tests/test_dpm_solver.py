"""DPM-Solver++ (2M) and steps even in log-SNR: order of convergence, the limit it shares with DDIM, the benchmark."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.sampler_error import sampler_errors
from diffusion.process import Prediction
from diffusion.samplers import ancestral, ddim, dpmpp
from diffusion.schedules import Schedule
from forked import ROOT, run
from known_answers import coefficients, image, knows_the_image, process_of, seeded, two_modes
from test_closed_form import Oracle

# Many steps, so that a subset of them can be even in log-SNR to high precision.
FINE = process_of(steps=20000)


def error_before_the_last_step(sampler, spec: str, size: tuple[int, int]) -> float:
    """Relative error of the state at step 0 against the probability-flow ODE: standard deviations map to each other."""
    process = FINE.respaced(spec)
    oracle = Oracle(process, size)
    states = []
    start = process.mollifier.noise(image(np.ones((1, 1, *size))))
    sampler(process.denoiser(oracle, clip=False), start, process, callback=lambda i, t, x, d: states.append(x))
    cleanest, noisiest = (process.schedule.alpha_bar[t].item() for t in (0, -1))
    deviations = [np.sqrt(a * oracle.c + (1 - a) * oracle.noise_variance) for a in (cleanest, noisiest)]
    exact = coefficients(start) * deviations[0] / deviations[1]
    return float(np.linalg.norm(coefficients(states[-2]) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (9, 16)])
def test_second_order(size):
    errors = {
        sampler: [error_before_the_last_step(sampler, f"logsnr{steps}", size) for steps in (20, 40, 80)]
        for sampler in (dpmpp, ddim)
    }
    orders = {sampler: np.log2(np.array(e[:-1]) / e[1:]) for sampler, e in errors.items()}
    assert (orders[dpmpp] > 1.8).all() and (orders[dpmpp] < 2.3).all()
    assert np.allclose(orders[ddim], 1, atol=0.15)
    assert errors[dpmpp][0] < 0.2 * errors[ddim][0]


def test_agrees_with_the_limit_of_ddim():
    whole = process_of(Prediction.EPS, sigma=0.0, steps=20000)
    x = torch.linspace(-2.5, 2.5, 40, dtype=torch.float64)[:, None]
    limit = ddim(two_modes(whole), x, whole)
    errors = {}
    for sampler, steps in ((dpmpp, 20), (dpmpp, 40), (ddim, 20), (ddim, 100)):
        process = whole.respaced(f"logsnr{steps}")
        errors[sampler, steps] = float((sampler(two_modes(process), x, process) - limit).norm() / limit.norm())
    assert errors[dpmpp, 20] < 0.3 * errors[ddim, 20]
    assert errors[dpmpp, 40] < 0.3 * errors[dpmpp, 20]
    assert errors[dpmpp, 40] < 0.4 * errors[ddim, 100]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "const0.008"])
@pytest.mark.parametrize("count", [1, 2, 7, 20, 100, 400])
def test_steps_even_in_log_snr(schedule, count):
    whole = Schedule.create(schedule, 1000)
    shorter = whole.respace(f"logsnr{count}")
    kept = shorter.timestep_map.tolist()
    assert len(kept) == count == len(set(kept)) and kept == sorted(kept) and kept[0] == 0
    assert count == 1 or whole.alpha_bar[kept[-1]] >= (1 / 127.5) ** 2
    gaps = shorter.log_snr[:-1] - shorter.log_snr[1:]
    if 2 <= count <= 20:  # more are limited by the steps there are
        resolution = (whole.log_snr[:-1] - whole.log_snr[1:])[: kept[-1]].max()
        assert (gaps - gaps.mean()).abs().max() <= 1.01 * resolution


@pytest.mark.parametrize("spec", ["logsnr", "logsnr0", "logsnrx", "logsnr1000", "logsnr-3"])
def test_wrong_steps(spec):
    with pytest.raises(ValueError, match=f"sampling steps are '{spec}'"):
        Schedule.create("cosine", 1000).respace(spec)


@pytest.mark.parametrize("steps", ["1", "2", "20", "logsnr9"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_finds_the_only_image(steps, dtype):
    """However the steps lie, the last of the cosine schedule with ᾱ = 2e-9 among them, and from any step."""
    process = process_of().respaced(steps)
    smooth, x = torch.randn(2, 2, 3, 5, 11, generator=seeded()).to(dtype)
    denoise = knows_the_image(process, smooth)
    for start in {None, 0, process.schedule.num_steps - 1}:
        result = dpmpp(denoise, x, process, start=start)
        assert result.dtype == dtype
        torch.testing.assert_close(result, smooth)


def test_corrections_see_every_step_of_every_sampler():
    process = process_of(Prediction.EPS, sigma=0.0).respaced("5")
    x = torch.zeros(2, 3)
    for sampler in (dpmpp, ddim, partial(ancestral, noise=lambda: torch.zeros(2, 3))):
        steps, states = [], []

        def correct(x, step, denoised, steps=steps):
            steps.append(step)
            return x + 10.0**step

        sampler(two_modes(process), x, process, correct=correct, callback=lambda i, t, x, d, s=states: s.append(x))
        assert steps == [4, 3, 2, 1, 0]
        assert all(state.abs().min() > 0.5 for state in states)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_twenty_steps_have_less_error_than_a_hundred_of_ddim(size):
    rows = {(row["sampler"], row["steps"]): row for row in sampler_errors(size)}
    for kind in ("map_error", "variance_error"):
        assert rows["dpmpp", "logsnr20"][kind] < 0.6 * rows["ddim", "100"][kind]
        assert rows["dpmpp", "logsnr15"][kind] < rows["ddim", "100"][kind]
        assert rows["ddim", "200"][kind] == pytest.approx(0.5 * rows["ddim", "100"][kind], rel=0.1)
    assert rows["ddim", "100"]["evaluations"] == 100 and rows["dpmpp", "logsnr20"]["evaluations"] == 20


def test_stored_result_is_what_the_benchmark_gives(tmp_path):
    done = run(["benchmarks/sampler_error.py", f"--json={tmp_path / 'r.json'}"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "benchmarks" / "results" / "sampler_error.txt").read_text()
    stored = json.loads((ROOT / "benchmarks" / "results" / "sampler_error.json").read_text())
    for row, expected in zip(json.loads((tmp_path / "r.json").read_text())["rows"], stored["rows"], strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
