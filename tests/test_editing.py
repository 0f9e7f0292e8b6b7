"""Filling holes, adding resolution and blending with an ideal denoiser and with networks; reading users' images."""

import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import micro
from data.pixels import to_float
from diffusion.conditioning import Known
from experiments.support.editing import step_count
from experiments.support.inputs import open_inputs, read_mask
from experiments.support.parsing import parse_box, parse_step
from infty_diff.editing import InpaintOptions, enlarged, inpaint, lerp, slerp, super_resolve
from infty_diff.model import InftyDiff, SamplingOptions
from metrics.images import ImageFolder
from test_generation import Optimal

FAST = SamplingOptions("5")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InftyDiff:
    config = micro.image(tmp_path_factory.mktemp("editing"))
    return InftyDiff(config, **micro.networks(config))


@pytest.fixture(scope="module")
def ideal(model) -> InftyDiff:
    """Knows the optimal denoiser of mollified white noise: nothing tells it what is in a hole."""
    return InftyDiff(model.config, model.encoder, Optimal(model.process))


def smooth_image(size: tuple[int, int]) -> torch.Tensor:
    """An image that survives the Wiener filter."""
    rows, cols = (torch.linspace(0, math.pi, n) for n in size)
    return torch.stack([0.7 * torch.cos(k * rows)[:, None] * torch.cos(cols) for k in (0, 1, 2)])


def box(size: tuple[int, int], top: int, left: int, height: int, width: int) -> torch.Tensor:
    return parse_box(f"{top},{left},{height},{width}", size)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
@pytest.mark.parametrize("see_hole", [False, True])
@pytest.mark.parametrize("size", [(16, 12), (13, 21)])
def test_every_way_of_inpainting_gives_images(model, sampler, see_hole, size):
    options = InpaintOptions(SamplingOptions("3", sampler), start_step=500, see_hole=see_hole, follow=True)
    results = inpaint(model, smooth_image(size), box(size, 4, 3, 5, 6), [0, 7], options)
    assert results.shape == (2, 3, *size) and results.isfinite().all() and not results.requires_grad


@pytest.mark.parametrize("plain", [False, True])
def test_the_unseen_hole_is_never_read(model, plain):
    size = (16, 12)
    mask, image = box(size, 5, 2, 6, 7), smooth_image(size)
    options = InpaintOptions(FAST, plain_guidance=plain, follow=True)
    first = inpaint(model, image, mask, [3], options)
    second = inpaint(model, torch.where(mask, image, math.nan), mask, [3], options)
    assert torch.equal(first, second)


@pytest.mark.parametrize("size", [(24, 20), (32, 48)])
def test_known_pixels_are_held_and_the_hole_differs_by_seed(ideal, size):
    image, mask = smooth_image(size), box(size, 8, 6, 9, 8)
    errors = {}
    for guidance, follow in ((0.0, False), (0.4, False), (0.4, True)):
        options = InpaintOptions(SamplingOptions("50"), guidance, follow=follow)
        results = inpaint(ideal, image, mask, [0, 1], options)
        errors[guidance, follow] = float((results - image)[..., mask].square().mean())
    assert errors[0.4, True] < errors[0.4, False] < 0.25 * errors[0.0, False]
    assert (results[0] - results[1])[..., ~mask].std() > 0.1


def test_an_early_start_from_the_whole_image_gives_it_back(ideal):
    image, mask = smooth_image((20, 28)), box((20, 28), 5, 5, 8, 9)
    error = {}
    for start in (50, 900):
        options = InpaintOptions(SamplingOptions("100"), 0.0, start_step=start, see_hole=True)
        error[start] = float((inpaint(ideal, image, mask, [0], options) - image).abs().mean())
    assert error[50] < error[900] < 0.1 and error[50] < 0.02


@pytest.mark.parametrize(("low", "size"), [((16, 12), (32, 24)), ((9, 14), (20, 31))])
def test_super_resolution_with_encoding_keeps_the_low_resolution(ideal, low, size):
    image = smooth_image(low)[None]
    without = super_resolve(ideal, image, size, [0], SamplingOptions("100"))
    results = {step: super_resolve(ideal, image, size, [0], SamplingOptions("100"), step) for step in (300, 999)}
    assert without.shape == (1, 3, *size)
    for result in results.values():
        reduced = torch.nn.functional.interpolate(result, low, mode="bicubic", antialias=True)
        assert (reduced - image).abs().mean() < 0.1
    other = super_resolve(ideal, image, size, [1], SamplingOptions("100"), 999)
    assert (other - results[999]).std() > 1e-3  # details above the low resolution are those of the seed
    assert (results[300] - enlarged(image, size)).abs().mean() < (results[999] - enlarged(image, size)).abs().mean()


def test_super_resolution_refuses_a_lower_one(model):
    with pytest.raises(ValueError, match=r"size is \(8, 40\); accepted: at least that of the images, \(16, 12\)"):
        super_resolve(model, torch.zeros(1, 3, 16, 12), (8, 40), [0], FAST)


@pytest.mark.parametrize("start", [None, 0, 500, 999])
def test_every_step_of_inversion_and_sampling_is_reported(model, start):
    calls, size = [], (16, 12)
    options = InpaintOptions(FAST, start_step=start)
    inpaint(model, smooth_image(size), box(size, 4, 3, 5, 6), [0], options, lambda *_: calls.append("inpaint"))
    steps = step_count(model, FAST, start, encoded=True)
    assert len(calls) == steps
    image = smooth_image(size)[None]
    super_resolve(model, image, (20, 24), [0], FAST, start, lambda *_: calls.append("finer"))
    assert len(calls) - steps == (step_count(model, FAST) if start is None else steps)


def test_lines_and_circles():
    a, b = torch.randn(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0])
    circle, line = slerp(a, b, weights), lerp(a, b, weights)
    for way in (circle, line):
        assert way.shape == (4, 3, 40, 50) and way.dtype == a.dtype
        torch.testing.assert_close(way[[0, -1]], torch.stack([a, b]))
    assert circle.std(dim=(1, 2, 3)) == pytest.approx(1, abs=0.03)
    assert float(line[2].std()) == pytest.approx(math.sqrt(0.5), abs=0.02)
    angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
    part = torch.arccos((a * circle[1]).sum() / a.norm() / circle[1].norm())
    assert float(part / angle) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(slerp(a, a, weights), torch.stack([a] * 4))
    torch.testing.assert_close(slerp(a, -a, weights[[0, -1]]), torch.stack([a, -a]))


def photo(path, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A smooth random picture (H, W), written to `path`."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    image.save(path)
    return np.array(image)


def test_images_of_a_file_a_folder_and_a_zip(model, tmp_path):
    data = model.config.data
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    exact = photo(tmp_path / "folder" / "a b.png", (30, 40), 0)
    photo(tmp_path / "folder" / "deep" / "c.jpg", (90, 33), 1)
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        for path in (tmp_path / "folder").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "folder").as_posix())
    one = open_inputs(str(tmp_path / "folder" / "a b.png"), data, (30, 40), 9)
    assert torch.equal(one.images[0], to_float(torch.from_numpy(exact).permute(2, 0, 1)))
    assert one.names == ["a b.png"] and one.own_sizes == [(30, 40)] and one.stem(0) == "000_a-b"
    for path in ("folder", "both.zip"):
        both = open_inputs(str(tmp_path / path), data, (20, 11), 9)
        assert both.images.shape == (2, 3, 20, 11) and both.own_sizes == [(30, 40), (90, 33)]
        assert both.names == ["a b.png", "deep/c.jpg"] and both.stem(1) == "001_c"
    assert len(open_inputs(str(tmp_path / "folder"), data, (20, 11), 1).images) == 1


def test_damage_in_an_archive_is_one_line(model, tmp_path):
    exact = photo(tmp_path / "a.png", (30, 40))
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "damaged.zip", "w", kind) as archive:
            archive.write(tmp_path / "a.png", "a.png")
        stored = bytearray((tmp_path / "damaged.zip").read_bytes())
        stored[200:220] = bytes(20)
        (tmp_path / "damaged.zip").write_bytes(stored)
        path = str(tmp_path / "damaged.zip")
        with pytest.raises(ValueError, match=r"--input is .*damaged.zip: a.png cannot be read .*; accepted: undamaged"):
            open_inputs(path, model.config.data, (16, 16), 4)
        with pytest.raises(ValueError, match=r"--samples: .*damaged.zip: a.png cannot be read"):
            ImageFolder(path, 3, "--samples")[0]
    assert np.array_equal(ImageFolder(str(tmp_path), 3, "--samples")[0], exact)


def test_images_of_the_data_set_at_any_size(model):
    for size in ((16, 12), (33, 70)):
        inputs = open_inputs(None, model.config.data, size, 2)
        assert inputs.images.shape == (2, 3, *size) and inputs.own_sizes == [size] * 2
        assert inputs.images.abs().max() <= 1 and len(inputs.names) == 2


def test_faults_of_images_are_one_line(model, tmp_path):
    data = model.config.data
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    photo(tmp_path / "small.png", (10, 40))
    too_small = r"is 10x40 \(HxW\), needed is at least 16x16; accepted: that, or a smaller size"
    faults = {"none.png": "an image, or a folder, zip or tar", "empty": "no images in", "broken.png": "decoded",
              "small.png": too_small}  # fmt: skip
    for name, words in faults.items():
        with pytest.raises(ValueError, match=rf"--input.*{name}.*{words}|--input.*{words}.*{name}"):
            open_inputs(str(tmp_path / name), data, (16, 16), 4)
    with pytest.raises(ValueError, match=r"broken.png cannot be decoded \(not an image of the formats BMP, .*WEBP\)"):
        open_inputs(str(tmp_path / "broken.png"), data, (16, 16), 4)


def test_masks_are_fitted_as_their_images(tmp_path):
    white = np.zeros((40, 60), np.uint8)
    white[10:20, 30:41] = 255  # 11 columns: the last reduced pixel is unknown in half
    Image.fromarray(white).save(tmp_path / "mask.png")
    known = read_mask(str(tmp_path / "mask.png"), (40, 60), (20, 20))  # columns 10 to 49 reduced by two
    expected = torch.ones(20, 20, dtype=torch.bool)
    expected[5:10, 10:16] = False
    assert torch.equal(known, expected)
    assert torch.equal(read_mask(str(tmp_path / "mask.png"), (40, 60), (40, 60)), torch.from_numpy(white == 0))


def test_faults_of_masks_boxes_and_steps_are_one_line(model, tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"mask.png: 20x30 \(HxW\); accepted: 16x12 \(HxW\)"):
        read_mask(str(tmp_path / "mask.png"), (16, 12), (16, 12))
    for name in ("none.png", "broken.png", "."):
        with pytest.raises(ValueError, match="--mask"):
            read_mask(str(tmp_path / name), (16, 12), (16, 12))
    with pytest.raises(ValueError, match="mask has no unknown pixels"):
        inpaint(model, torch.zeros(3, 20, 30), read_mask(str(tmp_path / "mask.png"), (20, 30), (20, 30)), [0],
                InpaintOptions(FAST))  # fmt: skip
    for text in ("", "1,2,3", "1,2,3,4,5", "a,b,c,d", "-1,0,2,2", "0,0,0,5", "10,0,7,2", "0,10,2,3"):
        with pytest.raises(ValueError, match=f"--box is '?{text}'?; accepted"):
            parse_box(text, (16, 12))
    assert [parse_step(text, 1000) for text in (None, "0", "999", "0.0", "1.0", ".5")] == [None, 0, 999, 0, 999, 500]
    for text in ("1000", "-1", "1.5", "x", ""):
        with pytest.raises(ValueError, match=f"--start_step is '?{text}'?; accepted: 0 to 999"):
            parse_step(text, 1000)
    for guidance in (-0.1, 1.0):
        with pytest.raises(ValueError, match="guidance is"):
            InpaintOptions(FAST, guidance)


def test_guidance_of_a_network_lowers_the_error_of_known_pixels(model):
    """Gradients reach the state through the whole network: a step along the gradient lowers the squared error."""
    size = (16, 12)
    image, mask = smooth_image(size)[None], box(size, 5, 2, 6, 7)
    process = model.process.respaced("10")
    latents = model.encode(image)
    denoise = model.denoiser_at(latents, process, clip=False)
    known = Known(image, mask, process, model.deblur)
    x, t = model.initial_noise([0], size), torch.tensor([4])
    guided = known.guided(denoise)(x, t)
    target = process.mollifier(known.completed(model.deblur(guided.smooth)))

    @torch.no_grad()
    def error(state: torch.Tensor) -> float:
        return float((mask * (denoise(state, t).smooth - target)).square().sum())

    assert guided.gradient.norm() > 0
    step = 1e-3 * guided.gradient / guided.gradient.norm()
    assert error(x - step) < error(x) < error(x + step)
    assert all(parameter.grad is None for parameter in model.denoiser.parameters())
