"""The model from Python: one import, weights by folder, file or name, devices, what users hand over, what they get."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infty_diff
from data.loader import batches
from diffusion.schedules import Schedule, make_betas
from infty_diff import InftyDiff, InpaintOptions, SamplingOptions, WrappedImages, to_pil, to_uint8
from infty_diff.images import as_images, as_size
from known_answers import seeded
from runtime import precision
from test_generation import stored

ROOT = Path(__file__).parents[1]
FAST = SamplingOptions(steps="ddim4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the runs micro and micro_sampler."""
    root = tmp_path_factory.mktemp("api")
    stored(root)
    return root


@pytest.fixture(scope="module")
def model(runs) -> InftyDiff:
    return InftyDiff.from_runs(runs / "micro", runs / "micro_sampler", "cpu")


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and "accepted" in text, text
    return text


def test_the_package_is_light_until_a_name_is_asked_for():
    code = "import infty_diff, sys; print(infty_diff.__version__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{infty_diff.__version__} False\n", done.stderr
    assert {getattr(infty_diff, name) for name in infty_diff.__all__} and set(infty_diff.__all__) <= set(
        dir(infty_diff)
    )
    with pytest.raises(AttributeError, match="no attribute 'InftyDif'; it has"):
        infty_diff.InftyDif  # noqa: B018


def test_the_project_says_once_who_and_which_version():
    project, citation = (ROOT / "pyproject.toml").read_text(), (ROOT / "CITATION.cff").read_text()
    assert 'version = { attr = "infty_diff.__version__" }' in project and not re.search(r'^version = "', project, re.M)
    assert "\nversion:" not in citation
    own = citation.partition("preferred-citation")[0]
    pairs = re.findall(r"family-names: (.+)\n +given-names: (.+)\n", own)
    names = [f"{given} {family}" for family, given in pairs] + re.findall(r'  - name: "(.+)"', own)
    assert re.findall(r'^    { name = "(.+)" }', project, re.M) == names and len(names) == 3


def states(model: InftyDiff) -> dict[str, torch.Tensor]:
    networks = {"encoder": model.encoder, "denoiser": model.denoiser}
    tensors = {f"{name}.{key}": v for name, network in networks.items() for key, v in network.state_dict().items()}
    return tensors | ({} if model.prior is None else model.prior.to_tensors())


@pytest.mark.parametrize("device", ["nonsense", "mps", "meta", "cuda:99", "", None, torch.device("mps")])
def test_other_devices_are_refused(runs, model, device):
    for use in (lambda: InftyDiff.from_runs(runs / "micro", device=device), lambda: model.to(device)):
        with pytest.raises(ValueError) as error:
            use()
        assert one_line(error).startswith(f"device is {device!r}")
    assert model.device == torch.device("cpu")


def test_devices_by_number(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for given in ("cuda:1", torch.device("cuda", 1)):
        assert precision.pick_device(given) == torch.device("cuda", 1) == current.pop()
    assert precision.pick_device("auto") == torch.device("cuda") and not current
    with pytest.raises(ValueError, match=r"device is 'cuda:2', not among the CUDA devices"):
        precision.pick_device("cuda:2")


def test_the_model_says_what_it_is(model, tmp_path):
    assert model.to("cpu") is model and model.to(torch.device("cpu")).device.type == "cpu"
    networks = (model.encoder, model.denoiser, model.prior.model)
    count = sum(p.numel() for network in networks for p in network.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    said = repr(model)
    assert said.startswith("InftyDiff(micro: trained at 16x12 with 3 channels; with prior;") and "\n" not in said
    assert f"{count / 1e6:.2f} M parameters; steps of training: image 1, latent 1; cpu, float32)" in said
    assert "no prior" in repr(InftyDiff(model.config, model.encoder, model.denoiser))


def test_everything_moves(runs, monkeypatch):
    moved = InftyDiff.from_runs(runs / "micro", runs / "micro_sampler", "cpu")
    monkeypatch.setattr("infty_diff.model.pick_device", torch.device)
    assert moved.to("meta") is moved and moved.device == moved.prior.device == moved.precision.device
    tensors = [*states(moved).values(), *moved.parameters()]
    assert {tensor.device.type for tensor in tensors} == {moved.device.type} == {"meta"}


PIXELS = torch.randint(0, 256, (2, 3, 9, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FLOATS = (PIXELS.float() / 127.5 - 1).double()


def pictures() -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS]


@pytest.mark.parametrize(
    ("given", "tolerance"),
    [
        (PIXELS, 0),
        (PIXELS.numpy(), 0),
        (pictures(), 0),
        (tuple(PIXELS), 0),
        (FLOATS, 0),
        (FLOATS.float(), 0),
        (FLOATS.numpy(), 0),
        (FLOATS.half(), 2.0**-11),
        (FLOATS.bfloat16(), 2.0**-8),
        ([FLOATS[0], pictures()[1]], 0),
    ],
)
def test_everything_that_holds_images_is_taken(given, tolerance):
    taken = as_images(given, 3, torch.device("cpu"))
    assert taken.dtype == torch.float32 and taken.shape == PIXELS.shape
    assert (taken - (PIXELS.float() / 127.5 - 1)).abs().max() <= tolerance


def test_one_image_is_a_batch_and_pil_images_take_the_channels():
    for given in (PIXELS[0], pictures()[0]):
        assert as_images(given, 3, torch.device("cpu")).shape == (1, 3, 9, 14)
    assert as_images(pictures(), 1, torch.device("cpu")).shape == (2, 1, 9, 14)
    assert as_images(pictures(), 4, torch.device("cpu"))[:, 3].eq(1).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (PIXELS.float(), "images reach 255"),
        (PIXELS.double().numpy(), "images reach 255"),
        (torch.full((1, 3, 4, 4), torch.nan), "images reach nan"),
        (PIXELS.long(), "images are torch.int64"),
        (PIXELS[:, :1], r"images have shape \(2, 1, 9, 14\); accepted: \(B, 3, H, W\)"),
        (PIXELS.permute(0, 2, 3, 1), "shape"),
        (PIXELS[0, 0], "shape"),
        (PIXELS[:0], "shape"),
        ([], "at least one image"),
        ([PIXELS[0], PIXELS[1, :, :5]], "one size for all"),
        ("photo.png", "images are str"),
        (None, "images are NoneType"),
    ],
)
def test_everything_else_is_refused_in_one_line(model, given, said):
    for use in (model.encode, model.encode_stochastic, lambda images: model.super_resolution(images, 32)):
        with pytest.raises(ValueError, match=said) as error:
            use(given)
        one_line(error)


def test_methods_take_them_all(model):
    exact = model.encode(FLOATS.float())
    assert torch.equal(model.encode(pictures()), exact)
    assert torch.equal(
        model.encode_stochastic(pictures(), exact.double(), 3), model.encode_stochastic(FLOATS.float(), exact, "3")
    )
    noise = model.initial_noise([0, 1], 12)
    assert torch.equal(model.decode(exact.double(), noise.double(), FAST), model.decode(exact, noise, FAST))
    known = torch.ones(9, 14, dtype=torch.bool)
    known[2:5, 3:8] = False
    options = InpaintOptions(SamplingOptions(3))
    filled = model.inpaint(pictures()[0], known, [4], options)
    assert torch.equal(filled, model.inpaint(PIXELS[0], known.numpy(), [4], options))
    assert torch.equal(
        model.super_resolution(pictures(), 20, None, FAST), model.super_resolution(PIXELS, (20, 20), [0, 1], FAST)
    )


def test_shapes_of_latents_and_noise_are_checked(model):
    noise = model.initial_noise([0, 1], (16, 12))
    for latents, states, said in (
        (torch.zeros(2, 5), noise, r"latents have shape \(2, 5\); accepted: \(B, 6\)"),
        (torch.zeros(1, 6), noise, r"noise has shape \(2, 3, 16, 12\); accepted: \(1, 3, H, W\)"),
        (torch.zeros(2, 6), noise[:, 0], "noise has shape"),
    ):
        with pytest.raises(ValueError, match=said):
            model.decode(latents, states, FAST)


def test_steps_and_sizes_may_be_numbers(model):
    assert SamplingOptions(25) == SamplingOptions("25") and SamplingOptions(20, "dpmpp").steps == "logsnr20"
    assert as_size(64) == (64, 64) and as_size([3, 4]) == as_size(torch.Size((3, 4))) == (3, 4)
    for size in (0, -4, (4, 0), (1, 2, 3), "64", 64.0, None, (8, 8.0)):
        with pytest.raises(ValueError, match="accepted: a side in pixels"):
            as_size(size)
    assert model.sample([0], 13, FAST, latent_steps=4).shape == (1, 3, 13, 13)
    assert torch.equal(model.initial_noise([3], 13), model.initial_noise([3], (13, 13)))
    for steps in (0, -1, 2.5, "many"):
        with pytest.raises(ValueError, match="sampling steps are"):
            model.sample([0], None, SamplingOptions(steps))


def test_many_samples_come_in_batches_with_a_bar(model, capsys):
    sizes = []
    keep = lambda i, t, x, denoised: sizes.append(len(x))  # noqa: E731
    images = model.sample(range(5), None, FAST, latent_steps=4, batch_size=2, progress=True, callback=keep)
    assert images.shape == (5, 3, 16, 12) and sizes == [2] * 8 + [1] * 4
    assert "5/5" in capsys.readouterr().err
    parts = [model.sample(seeds, None, FAST, latent_steps=4) for seeds in (np.arange(2), [2, 3], (4,))]
    assert torch.equal(torch.cat(parts), images) and capsys.readouterr().err == ""
    for seeds in (4, [], [-1], [0.5], "01", None):
        with pytest.raises(ValueError, match="accepted: whole numbers from 0"):
            model.sample(seeds)
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.sample([0], batch_size=0)


def test_the_filter_needs_no_new_samples(model):
    mollified = model.sample([2, 3], None, FAST, latent_steps=4, deblur=False)
    for inv_snr in (0.02, 0.3):
        expected = model.sample([2, 3], None, replace(FAST, inv_snr=inv_snr), latent_steps=4)
        assert torch.equal(model.deblur(mollified, inv_snr), expected)


def test_values_of_functions_at_points(model):
    """The samples themselves at their pixels, and with inv_snr the images; whatever holds the numbers."""
    mollified = model.sample([3], (13, 29), FAST, latent_steps="4", deblur=False)
    places = torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in (13, 29))).clamp(0, 1)
    for inv_snr, expected in ((None, mollified), (0.1, model.deblur(mollified, 0.1))):
        found = model.evaluate(mollified.numpy(), places.numpy(), inv_snr=inv_snr)
        torch.testing.assert_close(
            found.reshape(expected.shape), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
        )
    with pytest.raises(ValueError, match="unit square") as error:
        model.evaluate(mollified, places + 1)
    one_line(error)


def rounding_room(model: InftyDiff, latents: torch.Tensor, noise: torch.Tensor, images: torch.Tensor) -> float:
    """How far images move when their noise changes by 3e-6: untrained networks enlarge rounding by no fixed factor."""
    change = 3e-6 * torch.randn(noise.shape, generator=seeded(0))
    return float((model.decode(latents, noise + change, FAST) - images).abs().max())


def test_interpolation_begins_and_ends_at_its_ends(model):
    done = []
    way = model.interpolate([3, 8], 3, FAST, size=(20, 14), done=lambda i, image: done.append(image))
    samples = model.sample([3, 8], (20, 14), FAST)
    noise = model.initial_noise([3, 8], (20, 14))
    room = rounding_room(model, model.draw_latents([3, 8]), noise, samples)
    assert room < 0.02 * (samples[0] - samples[1]).abs().max()  # else the ends could be others
    torch.testing.assert_close(way[[0, 2]], samples, atol=room, rtol=0)
    assert way.shape == (3, 3, 20, 14) and torch.equal(torch.stack(done), way)
    between = model.interpolate(np.array([3, 8]), [0.5], FAST, size=(20, 14))
    torch.testing.assert_close(between, way[1:2], atol=room, rtol=0)
    images = model.interpolate(pictures(), [0.0, 1.0], FAST)
    code = model.encode_stochastic(PIXELS, steps=FAST.steps)
    expected = model.decode(model.encode(PIXELS), code, FAST)
    room = rounding_room(model, model.encode(PIXELS), code, expected)
    assert room < 0.02 * (expected[0] - expected[1]).abs().max()
    torch.testing.assert_close(images, expected, atol=room, rtol=0)
    for ends, options, said in (
        ([1, 2, 3], {}, "ends are 3"),
        ([1, 2], {"latents": "cubic"}, "latents is 'cubic'; accepted: lerp, slerp"),
        ([1, 2], {"options": SamplingOptions(4, eta=0.5)}, "eta 0.5, which draws noise at every step"),
        ([PIXELS[0], PIXELS[1, :, :5]], {}, "one size for all"),
    ):
        with pytest.raises(ValueError, match=said):
            model.interpolate(ends, **options)


def test_gradients_of_encodings_are_there_for_who_asks(model):
    images = FLOATS.float()
    assert not model.encode(images).requires_grad
    images.requires_grad_()
    with torch.no_grad():
        assert not model.encode(images).requires_grad
    gradient = torch.autograd.grad(model.encode(images).square().sum(), images)[0]
    step = 0.02 * gradient / gradient.norm()
    with torch.no_grad():
        ends = [float(model.encode(images + sign * step).square().sum()) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(float(gradient.norm()), rel=0.05)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_results_become_pictures():
    values = torch.tensor([-3.8, -1.0, 0.0, 1.0, 3.8]).expand(2, 3, 4, 5)
    shown = to_pil(values)
    assert [image.size for image in shown] == [(5, 4)] * 2 and shown[0].mode == "RGB"
    assert np.array(shown[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert [to_pil(torch.zeros(c, 4, 5))[0].mode for c in (1, 3, 4)] == ["L", "RGB", "RGBA"]
    back = as_images(to_pil(PIXELS), 3, torch.device("cpu"))
    assert torch.equal(to_uint8(back), PIXELS)


def test_schedules_of_ones_own():
    betas = make_betas("linear", 40)
    for given in (betas, betas.tolist()):
        own, named = Schedule.from_betas(given), Schedule.create("linear", 40)
        assert torch.equal(own.alpha_bar, named.alpha_bar) and own.original_steps == 40
    assert Schedule.from_betas([0.5, 0.75]).alpha_bar.tolist() == [0.5, 0.125]
    assert Schedule.from_betas([0.5, 0.75]).alpha_bar.dtype == torch.float64
    for wrong in ([], [0.1, 1.0], [0.0], [[0.1]], [float("nan")]):
        with pytest.raises(ValueError, match=r"accepted: one number in \(0, 1\) for each step"):
            Schedule.from_betas(wrong)


class Pairs:
    """A map-style data set of pictures with labels."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], i % 10


def test_map_style_data_sets_are_wrapped():
    for images in (pictures(), list(PIXELS), list(PIXELS.numpy())):
        for items in (images, Pairs(images)):
            wrapped = WrappedImages(items)
            assert wrapped.size == (9, 14) and torch.equal(torch.stack([wrapped[i] for i in range(2)]), PIXELS)
            assert wrapped.fingerprint() == WrappedImages(pictures()).fingerprint()
    small = WrappedImages(Pairs(pictures()), (6, 5), 1)
    expected = np.array(pictures()[1].convert("L").crop((3, 0, 11, 9)).resize((5, 6), Image.Resampling.LANCZOS))
    assert torch.equal(small[1], torch.from_numpy(expected)[None])
    batch = next(batches(WrappedImages(Pairs(pictures())), 2, seed=0, flip=False))
    assert sorted(batch.flatten(1).sum(1).tolist()) == sorted(PIXELS.flatten(1).sum(1).tolist())
    assert WrappedImages([PIXELS[0, 0]], channels=1)[0].shape == (1, 9, 14)
    assert WrappedImages(pictures()[::-1]).fingerprint() != WrappedImages(pictures()).fingerprint()


def test_what_is_no_image_is_named():
    for items, said in (
        ([], "items are none"),
        (list(FLOATS.float()), "item 0 is float32; accepted"),
        ([{"image": 1}], "item 0 is dict; accepted"),
        ([PIXELS], r"item 0 has shape \(2, 3, 9, 14\); accepted"),
        ([torch.zeros(2, 5, 7, dtype=torch.uint8)], "item 0 has shape"),
    ):
        with pytest.raises(ValueError, match=said):
            WrappedImages(items)
    with pytest.raises(ValueError, match="item 1 is 9x14"):
        WrappedImages(pictures(), (12, 12))[1]
    with pytest.raises(IndexError):
        WrappedImages(pictures())[2]
