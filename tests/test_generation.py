"""The model's API and the sample folder: seeds, sizes, batching, inversion, resumption, manifests."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import micro
from configs.schema import ImageConfig
from data.datasets import open_dataset
from diffusion.coordinates import Points
from diffusion.samplers import SAMPLERS, Sampler
from experiments.support.parsing import parse_seeds, parse_size
from infty_diff.editing import InpaintOptions, inpaint
from infty_diff.encodings import load_or_encode
from infty_diff.folder import FolderOptions, contact_sheet, draw_folder
from infty_diff.latent_prior import LatentPrior
from infty_diff.model import InftyDiff, SamplingOptions
from models.factory import build_latent_model
from models.operators.sparse_conv import native
from runtime.claimed import save_png
from runtime.precision import Precision
from runtime.weights import save_weights

FAST = SamplingOptions(steps="4")
ROOT = Path(__file__).resolve().parents[1]


def build(root, changes=None) -> InftyDiff:
    image, latent = micro.image(root, changes), micro.latent(root)
    networks = micro.networks(image).values()
    prior_model = build_latent_model(latent.model, image.model.z_dim)
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.rand(image.model.z_dim, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    return InftyDiff(image, *networks, LatentPrior(latent, prior_model, mean, std))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InftyDiff:
    return build(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("size", [(16, 12), (24, 24), (13, 29)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_alone(model, size, sampler):
    # The noisiest step divides the rounding of differently batched products by 5e-5: these steps leave it out.
    options = SamplingOptions(steps="ddim4", sampler=sampler)
    together = model.sample([7, 3, 11], size, options, latent_steps="4")
    alone = model.sample([3], size, options, latent_steps="4")
    assert together.shape == (3, 3, *size) and together.isfinite().all()
    assert (together[1] - alone[0]).abs().max() < 1e-4 * together.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_a_new_sampler_needs_one_entry(model, monkeypatch):
    """It is registered, and the model and the commands know it."""

    def jump(denoise, x, process, *, noise=None, start=None, correct=None, callback=None):
        t = torch.full((len(x),), process.schedule.num_steps - 1)
        denoised = denoise(x, t)
        callback(0, int(t[0]), denoised.smooth, denoised)
        return denoised.smooth

    monkeypatch.setitem(SAMPLERS, "jump", Sampler(jump, steps="ddim50", spacing="ddim"))
    options = SamplingOptions("4", "jump")
    assert (options.steps, SamplingOptions(sampler="jump").steps) == ("ddim4", "ddim50")
    assert not options.draws_noise
    found = model.sample([5], (13, 29), options, latent_steps="4", deblur=False)
    process, latents = model.process.respaced("ddim4"), model.prior.sample([5], "4")
    denoise = model.denoiser_at(latents, process)
    assert torch.equal(found, denoise(model.initial_noise([5], (13, 29)), torch.tensor([3])).smooth)

    script = """
import runpy, sys
from diffusion.samplers import SAMPLERS
SAMPLERS["jump"] = SAMPLERS["ddim"]
runpy.run_path(sys.argv[1], run_name="__main__")
"""
    command = [sys.executable, "-c", script, "experiments/generate_samples.py", "--sampler=heun"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "<ddim|ddpm|dpmpp|" in done.stderr and "|jump>" in done.stderr


def test_stochastic_ddim_draws_new_noise_each_step(model):
    noise = model.step_noise([5], (16, 12))
    first, second = noise(), noise()
    assert not torch.equal(first, second)
    assert torch.equal(first, model.step_noise([5], (16, 12))())
    with_noise = model.sample([5], None, SamplingOptions("4", eta=1.0), latent_steps="4")
    assert not torch.allclose(with_noise, model.sample([5], None, FAST, latent_steps="4"))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_channel_count(tmp_path, channels):
    model = build(tmp_path, {"data.channels": channels})
    images = model.sample([0, 1], (16, 20), FAST, latent_steps="4")
    assert images.shape == (2, channels, 16, 20)


def test_white_noise_diffusion_has_no_mollifier(tmp_path):
    model = build(tmp_path, {"diffusion.gaussian_filter_std": 0.0, "diffusion.model_mean_type": "epsilon"})
    noise = model.initial_noise([0], (40, 40))
    assert noise.std().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(model.deblur(noise), noise)
    assert model.sample([0], (24, 24), FAST, latent_steps="4").shape == (1, 3, 24, 24)


class Optimal(nn.Module):
    """The optimal noise prediction for standard normal data, √(1 − ᾱ)·x_t, of images or of latents."""

    def __init__(self, process):
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(1))
        self.schedule = process.schedule

    def forward(self, x, *rest):
        time = next(r for r in rest if isinstance(r, torch.Tensor))
        t = (time * self.schedule.num_steps / 1000).round().long()
        return x * self.schedule.at("sqrt_one_minus_alpha_bar", t, x)


def test_decode_inverts_encode_stochastic(model):
    """For a smooth denoiser the inversion converges as steps grow (Song et al. 2021), at any size."""
    ideal = InftyDiff(model.config, model.encoder, Optimal(model.process))
    for size in ((16, 12), (24, 40)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        latents, target, errors = torch.zeros(2, 6), ideal.process.mollifier(images), []
        for steps in ("20", "200"):
            code = ideal.encode_stochastic(images, latents, steps)
            decoded = ideal.decode(latents, code, SamplingOptions(steps, clip=False), deblur=False)
            errors.append((decoded - target).abs().max().item())
        assert errors[1] < 0.2 * errors[0] and errors[1] < 0.02


def test_latents_follow_the_statistics(model):
    """A latent model that predicts the optimal noise of standard normal latents must give the stored mean and std."""
    ideal = LatentPrior(model.prior.config, Optimal(model.prior.process), model.prior.mean, model.prior.std)
    drawn = ideal.sample(range(3000)).double()
    assert torch.allclose(drawn.mean(0), ideal.mean, atol=0.07)
    assert torch.allclose(drawn.std(0), ideal.std, rtol=0.05)


def test_faults_are_one_line(model, tmp_path):
    with pytest.raises(ValueError, match="sampler is 'euler'; accepted: ddim, ddpm, dpmpp"):
        SamplingOptions(sampler="euler")
    with pytest.raises(ValueError, match="eta is 2; accepted: 0 to 1"):
        SamplingOptions(eta=2)
    with pytest.raises(ValueError, match=r"eta is 0.5; accepted: 0, since only ddim"):
        SamplingOptions(sampler="dpmpp", eta=0.5)
    with pytest.raises(ValueError, match="inv_snr is 0"):
        SamplingOptions(inv_snr=0)
    with pytest.raises(ValueError, match="100"):
        model.sample([0], None, SamplingOptions("2000"))
    with pytest.raises(ValueError, match=r"points\.index is 0 to 192; accepted: 0 to 191"):
        model.encode(torch.zeros(1, 3, 16, 12), Points((16, 12), torch.tensor([[0, 192]])))
    with pytest.raises(ValueError, match="latent model of stage two"):
        InftyDiff(model.config, model.encoder, model.denoiser).sample([0])
    with pytest.raises(ValueError, match="no such file"):
        InftyDiff.from_runs(tmp_path, device="cpu")


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("192x320", (192, 320)), ("7x1", (7, 1))])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "x", "64x", "64x0", "-3", "1.5", "64X64", "64 x 64"])
def test_wrong_sizes(text):
    with pytest.raises(ValueError, match="accepted: a side"):
        parse_size(text)


def test_seeds():
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("7, 3,10-12,11") == [3, 7, 10, 11, 12]
    for text in ("", "3-1", "a", "1-", "-1", "1,,2"):
        with pytest.raises(ValueError, match="accepted: numbers and ranges"):
            parse_seeds(text)


def folder_options(**changes) -> FolderOptions:
    return FolderOptions(**{"size": (16, 12), "sampling": FAST, "latent_steps": "4", "batch_size": 2, **changes})


def pixels(folder) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in folder.glob("0*.png")}


def test_folder_is_independent_of_batching_and_resumable(model, tmp_path):
    seeds, provenance = [0, 1, 2, 3, 4], {"run": "x"}
    assert draw_folder(model, tmp_path / "a", seeds, folder_options(), provenance) == 5
    assert draw_folder(model, tmp_path / "b", [3], folder_options(batch_size=1), provenance) == 1
    (tmp_path / "b" / "000001.png").write_bytes(b"cut")  # as a crash of another program would leave it
    assert draw_folder(model, tmp_path / "b", seeds, folder_options(batch_size=5), provenance) == 4
    assert draw_folder(model, tmp_path / "b", seeds, folder_options(), provenance) == 0
    a, b = pixels(tmp_path / "a"), pixels(tmp_path / "b")
    assert a.keys() == b.keys() == {f"{seed:06d}.png" for seed in seeds}
    for name in a:
        assert a[name].shape == (16, 12, 3)
        assert np.array_equal(a[name], b[name])
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["settings"]["size"] == [16, 12] and manifest["model"] == provenance
    assert (tmp_path / "a" / "contact_sheet.png").stat().st_size > 0


def test_folder_of_other_settings_is_refused(model, tmp_path):
    draw_folder(model, tmp_path, [0], folder_options(), {"run": "x"})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="holds results of other settings"):
        draw_folder(model, tmp_path, [0, 1], folder_options(size=(8, 8)), {"run": "x"})
    with pytest.raises(ValueError, match="holds results of other model"):
        draw_folder(model, tmp_path, [0, 1], folder_options(), {"run": "y"})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json: not readable"):
        draw_folder(model, tmp_path, [0], folder_options(), {"run": "x"})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_raw_files_hold_the_mollified_images(model, tmp_path):
    draw_folder(model, tmp_path, [0, 1], folder_options(save_raw=True), {})
    raw = torch.from_numpy(np.load(tmp_path / "raw" / "000001.npy", allow_pickle=False))
    image = np.array(Image.open(tmp_path / "000001.png")).astype(np.float32) / 127.5 - 1
    deblurred = model.deblur(raw).clamp(-1, 1).permute(1, 2, 0).numpy()
    assert raw.dtype == torch.float32 and np.abs(deblurred - image).max() <= 1 / 255 + 1e-5


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_are_written(tmp_path, channels):
    model = build(tmp_path / "model", {"data.channels": channels})
    draw_folder(model, tmp_path / "out", [0], folder_options(), {})
    assert Image.open(tmp_path / "out" / "000000.png").mode == {1: "L", 4: "RGBA"}[channels]


def test_large_contact_sheets_are_reduced(tmp_path):
    for seed in range(3):
        save_png(tmp_path / f"{seed:06d}.png", torch.full((3, 400, 1600), seed * 80, dtype=torch.uint8), "mark", {})
    contact_sheet(tmp_path, "mark")
    assert max(Image.open(tmp_path / "contact_sheet.png").size) < 2200


def test_encodings_are_cached_by_weights_and_data(tmp_path):
    model = build(tmp_path)
    run = tmp_path / "micro"
    tensors = {f"encoder.{k}": v for k, v in model.encoder.state_dict().items()}
    save_weights(run / "weights.safetensors", tensors, {"step": 1})
    latents = load_or_encode(model, model.config.data, run / "weights.safetensors")
    images = open_dataset(model.config.data, "train")
    assert latents.mu.shape == (len(images), 2, 6)
    first = images[0][None].float() / 127.5 - 1
    assert torch.allclose(latents.mu[0, 0], model.encode(first)[0], atol=1e-5)
    assert torch.allclose(latents.mu[0, 1], model.encode(first.flip(-1))[0], atol=1e-5)

    model.encoder.forward = None  # a cached set needs no network
    again = load_or_encode(model, model.config.data, run / "weights.safetensors")
    assert torch.equal(again.mu, latents.mu) and torch.equal(again.std, latents.std)
    save_weights(run / "weights.safetensors", tensors, {"step": 2})
    with pytest.raises(TypeError):  # other weights: encoded anew
        load_or_encode(model, model.config.data, run / "weights.safetensors")


def test_encodings_for_stage_two_are_float32(tmp_path):
    model = build(tmp_path)
    half = InftyDiff(model.config, model.encoder, model.denoiser, precision=Precision(model.device, torch.bfloat16))
    images = open_dataset(model.config.data, "train").pixels[:3].float() / 127.5 - 1
    assert not torch.allclose(half.encode(images), model.encode(images), atol=1e-5)
    save_weights(tmp_path / "micro" / "weights.safetensors", {"w": torch.zeros(1)}, {})
    latents = load_or_encode(half, model.config.data, tmp_path / "micro" / "weights.safetensors")
    assert torch.allclose(latents.mu[:3, 0], model.encode(images), atol=1e-5)


def stored(root) -> InftyDiff:
    """The model of `build`, read back from its files."""
    model = build(root)
    tensors = {
        f"{name}.{key}": value
        for name in ("encoder", "denoiser")
        for key, value in getattr(model, name).state_dict().items()
    }
    for run, content, config in (
        ("micro", tensors, model.config),
        ("micro_sampler", model.prior.to_tensors(), model.prior.config),
    ):
        save_weights(root / run / "weights.safetensors", content, {"step": 1, "config": asdict(config)})
    return InftyDiff.from_runs(root / "micro", root / "micro_sampler", "cpu")


def test_loaded_weights_have_no_gradients(tmp_path):
    model = stored(tmp_path)
    networks = (model.encoder, model.denoiser, model.prior.model)
    assert not any(p.requires_grad for network in networks for p in network.parameters())
    assert not any(network.training for network in networks)


def test_the_denoiser_computes_gradients_where_a_state_asks_for_them(tmp_path):
    """Also of weights that could have some, and outside of `torch.no_grad`."""
    model = build(tmp_path)
    denoise = model.denoiser_at(torch.zeros(1, 6), model.process.respaced("4"))
    state, step = model.initial_noise([0], (16, 12)), torch.tensor([2])
    assert not denoise(state, step).smooth.requires_grad
    assert denoise(state.requires_grad_(), step).smooth.requires_grad
    with torch.no_grad():
        assert not denoise(state, step).smooth.requires_grad


@pytest.mark.parametrize("guidance", [0.0, 0.4])
def test_inpainting_above_the_training_size_takes_the_low_rank_path(tmp_path, monkeypatch, guidance):
    model, size, used = stored(tmp_path), (64, 48), []

    def spy(x, weight, plan, groups, choose=native._engine):
        used.append((choose(x, weight, plan, groups), plan.points.is_full, torch.is_grad_enabled()))
        return used[-1][0]

    monkeypatch.setattr(native, "_engine", spy)
    mask = torch.ones(size, dtype=torch.bool)
    mask[20:40, 10:30] = False
    options = InpaintOptions(SamplingOptions("2"), guidance)
    assert inpaint(model, torch.zeros(3, *size), mask, [0], options).isfinite().all()
    of_lattices = [(engine, gradients) for engine, full, gradients in used if full]
    assert {engine for engine, _ in of_lattices} == {native.enlarged}
    assert {gradients for _, gradients in of_lattices} == ({False, True} if guidance else {False})


def test_inference_changes_no_weight_and_needs_no_gradient(model):
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    assert not model.sample([0], None, FAST, latent_steps="4").requires_grad
    assert all(torch.equal(before[k], v) for k, v in model.denoiser.state_dict().items())
    assert not model.denoiser.training and not model.encoder.training
    assert isinstance(model.config, ImageConfig) and isinstance(model.precision, Precision)
