"""Comparison of `diffusion/` with the parity vectors; `test_parity.py` calls the function that belongs to a file.

Every `check_*` takes the path of a file, its arrays and its `config`, and compares whatever the file holds: other
sizes, schedules and steps need no change here.
"""

from __future__ import annotations

from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import torch

from diffusion.coordinates import Points, gather_points
from diffusion.losses import LOSSES, kl_gaussians, log_probability_8bit
from diffusion.mollifier import IDENTITY, Mollifier
from diffusion.process import Denoised, DiffusionProcess, Prediction, Variance
from diffusion.samplers import ancestral, ancestral_step, ddim, ddim_invert, ddim_invert_step, ddim_step
from diffusion.schedules import Schedule, space_timesteps
from parity_vectors import Vectors

SCHEDULE_TOLERANCE = 1e-12  # relative to each entry
TOLERANCE = 1e-5  # relative to the largest entry of the array

# Outputs that record a defect of the published code; the marks are those of the description of the vectors, section
# 10.
LEFT_OUT_IF_MOLLIFIED = (
    # B1: a predicted ξ or v is used as if it were Tξ or Tv; blurring the mean, as the ancestral step does, is no
    # remedy. Their estimates of x_0 involve no blur and are compared with a process that has none.
    "out/p_sample/epsilon/*/sample",
    "out/p_sample/v/*/sample",
    "out/ddpm/epsilon/*/sample",
    "out/ddpm/v/*/sample",
    "out/ddim/epsilon/*/sample",
    "out/ddim/epsilon/*/pred_xstart_last",
    "out/ddim/v/*/sample",
    "out/ddim/v/*/pred_xstart_last",
    # B1: DDIM never mollifies a predicted x_0; the ancestral sampler does, and is compared.
    "out/ddim/xstart/*/sample",
    "out/ddim/xstart/*/pred_xstart_last",
)
LEFT_OUT = (
    # B4: the inversion runs from the noisiest step to the cleanest.
    "out/ddim_reverse/*/reference_order",
    *LEFT_OUT_IF_MOLLIFIED,
)

# Tables that we do not keep, by what the authors call them.
DERIVED_TABLES = {
    "log_one_minus_alphas_cumprod": lambda schedule: (1 - schedule.alpha_bar).log(),
    "sqrt_recip_alphas_cumprod": lambda schedule: schedule.alpha_bar.rsqrt(),
    "fixed_large_variance": lambda schedule: schedule.fixed_large_log_variance.exp(),
}


def check_schedules(path: Path, data: Vectors, config: dict) -> None:
    """Every table of every schedule, and the respaced steps."""
    for key in data.files:
        if key == "config":
            continue
        owner, table = key.split("/", 1)
        if owner == "space":
            steps, spec = table.split("/")
            assert space_timesteps(int(steps), spec) == data[key].tolist(), f"{path.name}: {key}"
            continue
        schedule = _schedule_called(owner)
        derived = DERIVED_TABLES.get(table)
        actual = derived(schedule) if derived else getattr(schedule, table.replace("alphas_cumprod", "alpha_bar"))
        np.testing.assert_allclose(actual.numpy(), data[key], rtol=SCHEDULE_TOLERANCE, err_msg=f"{path.name}: {key}")


def _schedule_called(owner: str) -> Schedule:
    """cosine_1000, shifted_cosine256_1000 (resolution 256), or spaced_cosine_1000_ddim50."""
    if owner.startswith("spaced_"):
        owner, spec = owner.removeprefix("spaced_").rsplit("_", 1)
        return _schedule_called(owner).respace(spec)
    name, steps = owner.rsplit("_", 1)
    resolution = name.removeprefix("shifted_cosine")
    if resolution != name:
        return Schedule.create("shifted_cosine", int(steps), int(resolution))
    return Schedule.create(name, int(steps))


def check_mollifier(path: Path, data: Vectors, config: dict) -> None:
    """Both kinds of blur, the multipliers, and the Wiener filter. Tags are dct_N_stdσ_isnrE and conv_N_stdσ."""
    comparison = Comparison(path, data, mollified=True)
    for tag in sorted({key.split("/")[1] for key in data.files if key.startswith("in/")}):
        kind, side, std, *inv_snr = tag.split("_")
        mollifier = Mollifier(float(std.removeprefix("std")), (int(side), int(side)), kind)
        x = comparison.given(f"in/{tag}/x")
        forward = mollifier(x)
        comparison.compare(f"out/{tag}/forward", forward)
        if kind == "dct":
            level = float(inv_snr[0].removeprefix("isnr"))
            comparison.compare(f"out/{tag}/gain", mollifier.gain(tuple(x.shape[-2:])))
            comparison.compare(f"out/{tag}/undo_wiener", mollifier.inverse(x, level))
            comparison.compare(f"out/{tag}/undo_wiener_of_forward", mollifier.inverse(forward, level))
        else:  # an impulse away from the border is answered with the kernel itself
            kernel = data[f"out/{tag}/kernel"]
            impulse = torch.zeros_like(x)
            impulse[..., int(side) // 2, int(side) // 2] = 1
            first, last = int(side) // 2 - kernel.shape[-1] // 2, int(side) // 2 + kernel.shape[-1] // 2 + 1
            comparison.compare(f"out/{tag}/kernel", mollifier(impulse)[0, :, None, first:last, first:last])
    comparison.finish()


def check_diffusion_losses(path: Path, data: Vectors, config: dict) -> None:
    """Forward process, losses of every prediction at all and at some pixels, and the helpers of the variational
    bound."""
    comparison = Comparison(path, data, mollified=True)
    x_0, white, t, index = (comparison.given(f"in/{name}") for name in ("x_start", "noise", "t", "sample_lst"))
    points = {"dense": Points(tuple(x_0.shape[-2:])), "sparse": Points(tuple(x_0.shape[-2:]), index)}
    for blur, mollifier in (("mollified", _mollifier(config)), ("plain", IDENTITY)):
        out = f"out/{blur}"
        for prediction in Prediction:
            process = DiffusionProcess(_schedule(config), mollifier, prediction)
            x_t, target = process.training_pair(x_0, t, white)
            output = _toy_model(x_t, process.schedule.network_time(t))
            for name, loss in LOSSES.items():
                for density, where in points.items():
                    value = loss(gather_points(output, where), gather_points(target, where))
                    comparison.compare(f"{out}/{prediction.value}/{name}/{density}/loss", value)
        comparison.compare(f"{out}/q_sample", process.q_sample(x_0, t, white))
        comparison.compare(f"{out}/mollified_noise", mollifier.noise(white))
        comparison.compare(f"{out}/q_mean", process.schedule.at("sqrt_alpha_bar", t, x_0) * x_0)
        comparison.compare(f"{out}/q_variance", 1 - process.schedule.alpha_bar[t])
        comparison.compare(f"{out}/q_log_variance", (1 - process.schedule.alpha_bar[t]).log())
    gaussians = (comparison.given(f"in/kl/{name}") for name in ("mean1", "logvar1", "mean2", "logvar2"))
    comparison.compare("out/kl", kl_gaussians(*gaussians))
    comparison.compare(
        "out/nll/log_prob",
        log_probability_8bit(*(comparison.given(f"in/nll/{name}") for name in ("x", "means", "log_scales"))),
    )
    comparison.finish()


def check_diffusion_sampling(path: Path, data: Vectors, config: dict) -> None:
    """Single reverse steps, learned variances, trajectories of every sampler, inversion, and vectors."""
    mollifier = _mollifier(config)
    comparison = Comparison(path, data, mollified=not mollifier.identity)
    schedule = _schedule(config)
    _check_single_steps(comparison, schedule, mollifier)
    _check_learned_variances(comparison, schedule, mollifier)
    short = schedule.respace(data["in/use_timesteps"].tolist())
    _check_trajectories(comparison, short, mollifier)
    _check_inversion(comparison, short, mollifier)
    _check_vectors(comparison, config)
    comparison.finish()


def _check_single_steps(comparison: Comparison, schedule: Schedule, mollifier: Mollifier) -> None:
    x, t, white = (comparison.given(f"in/p_sample/{name}") for name in ("x", "t", "noise"))
    for key in comparison.outputs("out/p_sample/"):
        _, _, prediction, variance, multiplier, clip, result = key.split("/")
        # The published estimate of x_0 is not mollified, but for a predicted Tξ, where no mollifier is involved.
        blur = mollifier if result == "sample" else IDENTITY
        process = DiffusionProcess(schedule, blur, Prediction(prediction), Variance(variance))
        denoised = process.denoiser(_toy_model, clip == "clip1")(x, t)
        noise = mollifier(float(multiplier.removeprefix("mul")) * white)
        sample = ancestral_step(process, denoised, x, t, noise)
        comparison.compare(key, sample if result == "sample" else denoised.smooth)


def _check_learned_variances(comparison: Comparison, schedule: Schedule, mollifier: Mollifier) -> None:
    x, t = comparison.given("in/p_sample/x"), comparison.given("in/p_sample/t")
    output = torch.cat([_toy_model(x, schedule.network_time(t)), torch.tanh(x)], dim=1)
    for variance in (Variance.LEARNED, Variance.LEARNED_RANGE):
        process = DiffusionProcess(schedule, mollifier, Prediction.MOLLIFIED_EPS, variance)
        denoised = process.denoise(output, x, t, clip=True)
        out = f"out/p_mean_variance/{variance.value}"
        comparison.compare(f"{out}/mean", process.posterior_mean(denoised.smooth, x, t))
        comparison.compare(f"{out}/variance", denoised.log_variance.exp())
        comparison.compare(f"{out}/log_variance", denoised.log_variance)
        comparison.compare(f"{out}/pred_xstart", denoised.smooth)


def _check_trajectories(comparison: Comparison, schedule: Schedule, mollifier: Mollifier) -> None:
    initial, step_noise = comparison.given("in/loop/init"), comparison.given("in/loop/step_noise")
    for key in comparison.outputs("out/ddim/", "/sample") + comparison.outputs("out/ddpm/", "/sample"):
        _, sampler, prediction, variant, _ = key.split("/")
        out = key.removesuffix("/sample")
        process = DiffusionProcess(schedule, mollifier, Prediction(prediction))
        denoise = process.denoiser(_toy_model, clip=True)
        multiplier = 1.0 if variant == "given" else float(variant.removeprefix("mul"))
        state = initial if variant == "given" else mollifier(multiplier * initial)
        record = Trajectory()
        if sampler == "ddim":
            comparison.compare(f"{out}/first_state", state)
            ddim(denoise, state, process, callback=record)
            comparison.compare(f"{out}/pred_xstart_last", record.denoised.smooth)
        else:
            noises = iter(mollifier(multiplier * step_noise))
            ancestral(denoise, state, process, noise=partial(next, noises), callback=record)
        comparison.compare(key, record.at(comparison.given(f"{out}/steps")))


def _check_inversion(comparison: Comparison, schedule: Schedule, mollifier: Mollifier) -> None:
    x, steps = comparison.given("in/reverse/x"), schedule.num_steps
    for prediction, blur in ((Prediction.EPS, IDENTITY), (Prediction.MOLLIFIED_EPS, mollifier)):
        out = f"out/ddim_reverse/{prediction.value}"
        process = DiffusionProcess(schedule, blur, prediction)
        denoise = process.denoiser(_toy_model, clip=True)
        record = Trajectory()
        end = ddim_invert(denoise, blur(x), process, callback=record)
        # The published loop takes one step more, from the last state to pure noise.
        last = torch.full((len(x),), steps - 1)
        record(steps - 1, steps - 1, ddim_invert_step(process, denoise(end, last), end, last), record.denoised)
        comparison.compare(f"{out}/first_state", blur(x))
        comparison.compare(f"{out}/ascending", record.at(torch.tensor([0, steps // 2, steps - 2, steps - 1])))
    t = comparison.given("in/ddim_eta/t")
    process = DiffusionProcess(schedule, mollifier, Prediction.MOLLIFIED_EPS)
    denoised = process.denoiser(_toy_model, clip=True)(x, t)
    # The published step leaves its noise white; ours takes mollified noise, and cannot tell.
    for key in comparison.outputs("out/ddim_eta"):
        eta = float(key.split("/")[1].removeprefix("ddim_eta"))
        sample = ddim_step(process, denoised, x, t, eta, noise=comparison.given("in/p_sample/noise"))
        comparison.compare(key, sample)


def _check_vectors(comparison: Comparison, config: dict) -> None:
    kept = comparison.given("in/use_timesteps").tolist()
    schedule = Schedule.create("const0.008", config["steps"]).respace(kept)
    process = DiffusionProcess(schedule, IDENTITY, Prediction.EPS)
    noises = iter(comparison.given("in/latent/step_noise"))
    record = Trajectory()
    denoise = process.denoiser(_toy_model, clip=False)
    ancestral(denoise, comparison.given("in/latent/init"), process, noise=partial(next, noises), callback=record)
    comparison.compare("out/latent/ddpm", torch.stack(record.states))


def _toy_model(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The model behind the vectors, 0.3 · x · cos(time / 1000) + 0.1."""
    return 0.3 * x * torch.cos(time / 1000).reshape(-1, *(1,) * (x.ndim - 1)) + 0.1


def _schedule(config: dict) -> Schedule:
    return Schedule.create(config["schedule"], config["steps"], config["img_size"])


def _mollifier(config: dict) -> Mollifier:
    return Mollifier(config["gaussian_filter_std"], (config["img_size"],) * 2, config["mollifier_type"])


class Trajectory:
    """A sampler's callback that keeps the states and the last estimates."""

    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []

    def __call__(self, i: int, t: int, x: torch.Tensor, denoised: Denoised) -> None:
        self.states.append(x)
        self.denoised = denoised

    def at(self, steps: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.states[step] for step in steps.tolist()])


class Comparison:
    """Compares the outputs of a file one by one and reports all that differ at the end."""

    def __init__(self, path: Path, data: Vectors, mollified: bool) -> None:
        self.name, self.data, self.mollified = path.name, data, mollified
        self.failures: list[str] = []

    def given(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.data[key]))

    def outputs(self, prefix: str, suffix: str = "") -> list[str]:
        return [key for key in self.data.files if key.startswith(prefix) and key.endswith(suffix)]

    def compare(self, key: str, actual: torch.Tensor) -> None:
        if key not in self.data or (self.mollified and any(fnmatch(key, skip) for skip in LEFT_OUT_IF_MOLLIFIED)):
            return
        expected = self.given(key)
        if actual.shape != expected.shape:
            self.failures.append(f"{key}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
            return
        error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
        if not error <= TOLERANCE:
            self.failures.append(f"{key}: relative error {error:.1e}")

    def finish(self) -> None:
        assert not self.failures, f"{self.name}:\n" + "\n".join(self.failures)
