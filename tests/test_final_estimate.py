"""Images of a network that predicts x_0: its own last estimate, not a filtered one, wherever images are made."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import micro
from configs.defaults import image_config
from configs.validate import ConfigError, freeze
from data.pixels import to_uint8
from diffusion import samplers
from diffusion.conditioning import Known, descend
from diffusion.coordinates import image_to_points
from diffusion.mollifier import Mollifier
from diffusion.process import Denoised, Prediction
from diffusion.samplers import LastEstimate, ancestral, ddim, dpmpp
from experiments.support.options import folder_name
from infty_diff.editing import InpaintOptions, inpaint, super_resolve
from infty_diff.folder import FolderOptions, draw_folder
from infty_diff.latent_prior import LatentPrior
from infty_diff.model import InftyDiff, SamplingOptions
from known_answers import process_of
from models.factory import build_denoiser, build_encoder, build_latent_model
from runtime.stored import relocate
from test_training import image_trainer, latent_trainer

XSTART = {"diffusion.model_mean_type": "xstart"}
SIZES = [(16, 12), (13, 29)]
SAMPLERS = [SamplingOptions("5"), SamplingOptions("5", eta=0.7), SamplingOptions("5", "ddpm"),
            SamplingOptions("5", "dpmpp"), SamplingOptions("5", clip=False)]  # fmt: skip


def picture(size: tuple[int, int]) -> torch.Tensor:
    """A rough image: the Wiener filter cannot give it back."""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Knows(nn.Module):
    """Predicts the same image (1, 3, H, W) from every state, plus what the state's mean adds."""

    def __init__(self, image: torch.Tensor, slope: float = 0.0) -> None:
        super().__init__()
        self.image, self.slope = nn.Parameter(image_to_points(image)), slope

    def forward(self, x: torch.Tensor, *rest) -> torch.Tensor:
        return (self.image + self.slope * x).expand(len(x), -1, -1)


def knowing(root, size: tuple[int, int], changes: dict | None = None, slope: float = 0.0) -> InftyDiff:
    config, latent = micro.image(root, {**XSTART, **(changes or {})}), micro.latent(root)
    torch.manual_seed(0)
    prior = LatentPrior(latent, build_latent_model(latent.model, 6), torch.zeros(6).double(), torch.ones(6).double())
    return InftyDiff(config, build_encoder(config.model, 3, config.size), Knows(picture(size), slope), prior)


@pytest.mark.parametrize("options", SAMPLERS, ids=lambda o: f"{o.sampler}-{o.eta}-{o.clip}")
@pytest.mark.parametrize("size", SIZES)
def test_every_sampler_gives_the_image_that_the_network_knows(tmp_path, size, options):
    image = picture(size)
    model = knowing(tmp_path, size)
    found = model.sample([3, 4], size, options, latent_steps="3")
    torch.testing.assert_close(found, image.expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    filtered = knowing(tmp_path, size, {"diffusion.final_estimate": "filter"})
    assert (filtered.sample([3], size, options, latent_steps="3") - image).abs().max() > 0.05
    mollified = [m.sample([3], size, options, latent_steps="3", deblur=False) for m in (model, filtered)]
    assert torch.equal(*mollified)
    torch.testing.assert_close(mollified[0], model.process.mollifier(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", Prediction)
def test_only_a_predicted_image_is_sharp(prediction):
    process = process_of(prediction, size=(9, 14), steps=50)
    output, x_t = 2 * torch.randn(2, 2, 3, 9, 14, dtype=torch.float64)
    t = torch.tensor([0, 30])
    denoised = process.denoise(output, x_t, t, clip=True)
    assert process.gives_sharp == (prediction is Prediction.X0) == (denoised.sharp is not None)
    if denoised.sharp is not None:
        assert torch.equal(denoised.sharp, output.clamp(-1, 1))
        assert torch.equal(process.denoise(output, x_t, t, clip=False).sharp, output)
        torch.testing.assert_close(denoised.smooth, process.mollifier(denoised.sharp))
        half = process.denoise(output.half(), x_t.half(), t, clip=True)
        assert half.sharp.dtype == half.smooth.dtype == torch.float16
    filtered = dataclasses.replace(process, keep_sharp=False)
    assert filtered.denoise(output, x_t, t, clip=True).sharp is None and not filtered.gives_sharp


@pytest.mark.parametrize("sampler", [ddim, dpmpp, ancestral])
def test_the_exact_image_in_double_precision(tmp_path, sampler):
    size = (10, 17)
    image = picture(size).double()
    process = process_of(Prediction.X0, size=size).respaced("7")
    last, x = LastEstimate(), torch.randn(1, 3, *size, dtype=torch.float64)
    result = sampler(process.denoiser(lambda x_t, time: image, clip=True), x, process, noise=lambda: x, callback=last)
    found = knowing(tmp_path, size).sharpened(result, last.denoised)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-6)


def test_a_sampler_without_callbacks_is_refused_where_its_estimates_are_the_image(tmp_path, monkeypatch):
    def silent(denoise, x, process, *, callback=None, **rest):
        return ddim(denoise, x, process, **rest)

    ask = ([3], (9, 14), SamplingOptions("3"))
    expected = knowing(tmp_path, (9, 14), {"diffusion.final_estimate": "filter"}).sample(*ask, latent_steps="3")
    monkeypatch.setitem(samplers.SAMPLERS, "ddim", dataclasses.replace(samplers.SAMPLERS["ddim"], draw=silent))
    found = knowing(tmp_path, (9, 14), {"diffusion.final_estimate": "filter"}).sample(*ask, latent_steps="3")
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="the sampler called no callback; accepted: one that calls callback"):
        knowing(tmp_path, (9, 14)).sample(*ask, latent_steps="3")


def test_what_a_correction_adds_to_the_last_state_is_kept(tmp_path):
    """x = T x̂_0 + T d gives x̂_0 and d up to the filter, whose gains are g² / (g² + 0.05²)."""
    size = (16, 12)
    model, sharp = knowing(tmp_path, size), picture(size)
    rows, cols = (torch.linspace(0.5, n - 0.5, n) * torch.pi / n for n in size)
    added = torch.cos(2 * rows)[:, None] * torch.cos(3 * cols)  # a basis function of the filter
    mollifier = model.process.mollifier
    denoised = Denoised(mollifier(sharp), sharp, torch.zeros(1), sharp)
    gain = float(mollifier.gain(size)[2, 3])
    found = model.sharpened(mollifier(sharp + added), denoised)
    torch.testing.assert_close(found, sharp + gain**2 / (gain**2 + 0.05**2) * added, rtol=0, atol=1e-5)
    found = model.decode(torch.zeros(1, 6), model.initial_noise([0], size), SamplingOptions("3"),
                         correct=lambda x, step, _: x + mollifier(added))  # fmt: skip
    torch.testing.assert_close(found, sharp + gain**2 / (gain**2 + 0.05**2) * added, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_holes_are_filled_and_the_known_part_is_kept(tmp_path, size):
    """The network says the same everywhere; the image differs. Followed, its known part stays that of the image."""
    model = knowing(tmp_path, size)
    rows, cols = (torch.linspace(0, torch.pi, n) for n in size)
    image = (0.7 * torch.cos(rows)[:, None] * torch.cos(cols)).expand(3, -1, -1)
    mask = torch.ones(size, dtype=torch.bool)
    mask[5:10, 4:9] = False
    free, held = (
        inpaint(model, image, mask, [0], InpaintOptions(SamplingOptions("10"), 0.0, follow=follow))
        for follow in (False, True)
    )
    torch.testing.assert_close(free, picture(size), rtol=0, atol=1e-5)
    weights = Known(image[None], mask, model.process, model.deblur).soft_mask()
    bound = 6 * (1 - weights) + 1e-5
    assert ((held - image).abs() <= bound).all()
    if size[1] > 16:  # the narrow image has no pixel that far from the hole
        assert bound.min() < 0.01 and ((free - image).abs() > bound).any()


def test_guidance_completes_the_hole_by_the_sharp_estimate(tmp_path):
    """Against the formula, with a filter that must not be asked."""
    size = (16, 12)
    model = knowing(tmp_path, size, slope=0.3)
    mask = torch.ones(size, dtype=torch.bool)
    mask[4:9, 3:8] = False
    image, process = picture(size).flip(-1), model.process.respaced("5")
    denoise = model.denoiser_at(torch.zeros(1, 6), process, clip=False)

    def refuse(x):
        raise AssertionError("filtered")

    x, t = model.initial_noise([0], size), torch.tensor([2])
    guided = Known(image, mask, process, refuse).guided(denoise, plain=True)(x, t)
    state = x.clone().requires_grad_()
    sharp = picture(size) + 0.3 * state
    target = process.mollifier(torch.where(mask, image, sharp)).detach()
    (mask * (process.mollifier(sharp) - target)).square().sum().backward()
    torch.testing.assert_close(guided.gradient, state.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided.sharp, sharp.detach())
    assert not guided.sharp.requires_grad
    assert torch.equal(descend(0.5)(x, 0, guided), x - 0.5 * guided.gradient)


def test_finer_images_are_the_networks_own(tmp_path):
    size = (24, 30)
    model = knowing(tmp_path, size)
    model.denoiser, low = Knows(picture(size)), torch.zeros(1, 3, 16, 12)
    torch.testing.assert_close(super_resolve(model, low, size, [0], SamplingOptions("4")), picture(size))


def test_folders_hold_the_image_and_the_mollified_image(tmp_path):
    size = (16, 12)
    model, options = knowing(tmp_path, size), FolderOptions(size, SamplingOptions("4"), "3", save_raw=True)
    draw_folder(model, tmp_path / "out", [0], options, {})
    written = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "000000.png"))).permute(2, 0, 1)
    assert (written.int() - to_uint8(picture(size))[0].int()).abs().max() <= 1
    raw = torch.from_numpy(np.load(tmp_path / "out" / "raw" / "000000.npy"))
    torch.testing.assert_close(raw, model.process.mollifier(picture(size))[0], rtol=0, atol=1e-5)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["final_estimate"] == "network"
    filtered = knowing(tmp_path, size, {"diffusion.final_estimate": "filter"})
    with pytest.raises(ValueError, match="holds results of other settings"):
        draw_folder(filtered, tmp_path / "out", [0], options, {})
    assert [folder_name(options, m.process) for m in (model, filtered)] == [
        "16x12_ddim4_latent3", "16x12_ddim4_filter_latent3"
    ]  # fmt: skip


@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
def test_pictures_of_training_show_it(tmp_path, make):
    size, trainer = (16, 12), make(tmp_path, XSTART)
    if make is latent_trainer:
        trainer.stage.decoder = knowing(tmp_path, size)
        averaged = {"latent_model": trainer.stage.model}
    else:
        averaged = {**trainer.stage.modules, "denoiser": Knows(picture(size))}
    rows = trainer.stage.previews(averaged)
    expected = picture(size).expand_as(rows["deblurred"])
    torch.testing.assert_close(rows["deblurred"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rows["mollified"], Mollifier(1.0, size)(expected), rtol=0, atol=1e-5)


def test_tiles_give_the_same_images(tmp_path):
    """A network of which features are held tile by tile, on a lattice above its limit."""
    trainer = image_trainer(tmp_path, {**XSTART, "model.backend": "torch_dense"})
    found = []
    for points in (0, 400):
        config = micro.image(tmp_path, {**XSTART, "model.backend": "torch_dense", "model.tile_points": points})
        denoiser = build_denoiser(config.model, 3, config.size)
        denoiser.load_state_dict(trainer.stage.modules["denoiser"].state_dict())
        model = InftyDiff(config, trainer.stage.modules["encoder"], denoiser)
        noise = model.initial_noise([0], (40, 31))
        found.append(model.decode(torch.ones(1, 6), noise, SamplingOptions("ddim4")))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_network_that_predicts_something_else_has_no_such_image(tmp_path):
    config = image_config()
    config.diffusion.final_estimate = "network"
    said = ("config.diffusion.final_estimate is 'network'; accepted: auto or filter with "
            "diffusion.model_mean_type=mollified_epsilon; only xstart predicts the image")  # fmt: skip
    with pytest.raises(ConfigError) as error:
        freeze(config)
    assert error.value.faults == [said]
    config.diffusion.model_mean_type = "xstart"
    given, stored = freeze(config), micro.image(tmp_path)
    with pytest.raises(ConfigError) as error:  # the file says xstart, the run was trained otherwise
        relocate(stored, given, ["diffusion.final_estimate"], "run")
    assert error.value.faults == [said]
    trained = micro.image(tmp_path, XSTART)
    assert relocate(trained, given, ["diffusion.final_estimate"], "run").diffusion.final_estimate == "network"
