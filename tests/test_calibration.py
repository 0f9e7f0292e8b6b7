"""The filter fitted by frequency: closed forms for Gaussian images, its file, and what samples with it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.fft
import torch

from diffusion.calibration import InverseSnrFit
from diffusion.mollifier import IDENTITY, InverseSnr, Mollifier
from infty_diff.filter_file import CALIBRATED, filter_path, load_filter, save_filter
from infty_diff.model import InftyDiff
from infty_diff.sampling import SamplingOptions
from test_commands import fails, run
from test_edit_commands import command, kept, root  # noqa: F401 (a fixture)
from test_generation import build, stored

SIZE = (32, 24)
MOLLIFIER = Mollifier(1.0, SIZE)


def synthesised(spectrum: np.ndarray, count: int, generator: np.random.Generator) -> torch.Tensor:
    """Gaussian fields (count, 2, H, W) whose cosine coefficients have these variances."""
    coefficients = generator.standard_normal((count, 2, *spectrum.shape)) * np.sqrt(spectrum)
    return torch.from_numpy(scipy.fft.idctn(coefficients, axes=(-2, -1), norm="ortho"))


def fields(count: int, size=SIZE):
    """Images, reconstructions T x + error, and the ratio √(S_e / S_x) by frequency."""
    frequency = MOLLIFIER.frequencies(size).numpy()
    scale = np.prod(size) / np.prod(SIZE)  # coefficients of the same functions on a finer lattice are larger
    signal, error = scale / (0.05 + frequency**2), scale * 0.003 * np.exp(-frequency)
    generator = np.random.default_rng(0)
    images = synthesised(signal, count, generator)
    mollified = MOLLIFIER(images) + synthesised(error, count, generator)
    return images, mollified, torch.from_numpy(np.sqrt(error / signal))


def test_frequencies_are_those_of_the_gain():
    for size in (SIZE, (13, 40)):
        gain = torch.exp(-(torch.pi**2) * MOLLIFIER.frequencies(size) ** 2 / 2)
        torch.testing.assert_close(gain, MOLLIFIER.gain(size))


def test_independent_errors_give_the_wiener_optimum():
    images, mollified, ratio = fields(400)
    fit = InverseSnrFit(MOLLIFIER)
    for part in range(0, 400, 100):
        fit.add(images[part : part + 100], mollified[part : part + 100])
    found, gain, frequency = fit.result(), MOLLIFIER.gain(SIZE), MOLLIFIER.frequencies(SIZE)
    factor, best = (gain / (gain**2 + r**2) for r in (found.at(frequency), ratio))
    assert best.max() > 3 and best.max() > 5 * best.min()  # there is something to find
    assert (factor - best).abs().max() < 0.05 * best.max()
    assert (factor / best - 1)[frequency < 0.8].abs().max() < 0.1
    measurable = (frequency > 0.4) & (frequency < 0.8)  # errors and image within reach of each other
    assert (found.at(frequency) / ratio - 1)[measurable].abs().max() < 0.1


@pytest.mark.parametrize("size", [SIZE, (64, 48), (20, 40)])
def test_it_loses_little_to_the_optimum_at_any_size(size):
    """Against the exact filter, and against the best constant, in mean squared error."""
    fit = InverseSnrFit(MOLLIFIER)
    fit.add(*fields(400)[:2])
    images, mollified, ratio = fields(50, size)

    def error(ratios):
        if isinstance(ratios, torch.Tensor):
            gain = MOLLIFIER.gain(size)
            spectrum = scipy.fft.dctn(mollified.numpy(), axes=(-2, -1), norm="ortho")
            factors = (gain / (gain**2 + ratios**2)).numpy()
            made = torch.from_numpy(scipy.fft.idctn(spectrum * factors, axes=(-2, -1), norm="ortho"))
        else:
            made = MOLLIFIER.inverse(mollified, ratios)
        return (made - images).square().mean().item()

    found = error(fit.result())
    assert found < 1.002 * error(ratio)
    assert found < min(error(constant) for constant in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4))


def test_dependent_errors_and_lost_contrast_are_allowed_for():
    """y = a T x + e: the best factor is a g S_x / (a² g² S_x + S_e), at the frequencies with means of one kind."""
    images, mollified, ratio = fields(400)
    mollified = mollified - 0.3 * MOLLIFIER(images)
    fit = InverseSnrFit(MOLLIFIER)
    fit.add(images, mollified)
    frequency, gain = MOLLIFIER.frequencies(SIZE), MOLLIFIER.gain(SIZE)
    expected = 0.7 * gain / (0.49 * gain**2 + ratio**2)
    bounded = torch.minimum(expected, 1 / gain)  # never more than undoing the mollifier
    made = gain / (gain**2 + fit.result().at(frequency) ** 2)
    well = (frequency < 0.6) & (frequency > fit.spacing)
    assert ((made / bounded - 1)[well].abs() < 0.15).all()


def test_a_table_is_interpolated_and_continued():
    ratios = InverseSnr(0.5, (0.01, 0.1, 0.4))
    frequency = torch.tensor([[0.0, 0.25, 0.5], [1.0, 1.2, 9.0]])
    expected = torch.tensor([[0.01, 0.01 * 10**0.5, 0.1], [0.4, 0.4, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(ratios.at(frequency), expected)
    edge = ratios.at(torch.tensor([1.0 - 1e-9, 1.0 + 1e-9]))  # no jump
    assert abs(float(edge[0] / edge[1]) - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_ratios_are_the_constant(dtype):
    x = torch.randn(1, 2, 13, 29, dtype=torch.float64).to(dtype)
    one, other = MOLLIFIER.inverse(x, 0.2), MOLLIFIER.inverse(x, InverseSnr(0.1, (0.2, 0.2)))
    assert other.dtype == dtype
    torch.testing.assert_close(one, other)


def test_reconstructions_of_something_else_are_refused():
    fit = InverseSnrFit(MOLLIFIER)
    generator = torch.Generator().manual_seed(0)
    fit.add(torch.randn(8, 1, *SIZE, generator=generator), torch.randn(8, 1, *SIZE, generator=generator))
    with pytest.raises(ValueError, match="nothing in common"):
        fit.result()
    with pytest.raises(ValueError, match=r"accepted: both \(B, C, 32, 24\)"):
        fit.add(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    for mollifier, said in ((IDENTITY, "nothing to undo"), (Mollifier(1.0, SIZE, "conv"), "only this has the gain")):
        with pytest.raises(ValueError, match=said):
            InverseSnrFit(mollifier)
    for spacing, values in ((0.0, (1.0,)), (1.0, ()), (1.0, (1.0, 0.0)), (1.0, (float("nan"),))):
        with pytest.raises(ValueError, match=r"accepted: (a )?finite number"):
            InverseSnr(spacing, values)


def test_the_file_belongs_to_its_weights(tmp_path):
    weights, ratios = tmp_path / "weights.safetensors", InverseSnr(0.125, (0.01, 0.3))
    weights.write_bytes(b"these")
    with pytest.raises(ValueError, match=r"weights\.filter\.json is not there; accepted: a number, or"):
        load_filter(weights, MOLLIFIER)
    path = save_filter(weights, MOLLIFIER, ratios, {"images": 3})
    assert path == filter_path(weights) and load_filter(weights, MOLLIFIER) == ratios
    with pytest.raises(ValueError, match="made for another mollifier; accepted"):
        load_filter(weights, replace(MOLLIFIER, sigma=0.5))
    good = path.read_text()
    plain = json.dumps({key: value for key, value in json.loads(good).items() if key != "sha256"})
    path.write_text(plain)
    assert load_filter(weights, MOLLIFIER) == ratios
    wrong = (plain.replace("0.3", "-1"), plain.replace("0.3", "NaN"), plain.replace("0.125", '"x"'))
    for bad in ("{", "[]", "{}", *wrong, good.replace("0.3", "0.7")):
        path.write_text(bad)
        with pytest.raises(ValueError, match="no calibrated filter"):
            load_filter(weights, MOLLIFIER)
    path.write_text(good)
    weights.write_bytes(b"others")
    with pytest.raises(ValueError, match="made for other weights; accepted"):
        load_filter(weights, MOLLIFIER)


def test_what_the_options_accept():
    assert SamplingOptions(inv_snr="0.2") == SamplingOptions(inv_snr=0.2)
    assert SamplingOptions(inv_snr=CALIBRATED).inv_snr == CALIBRATED
    for wrong in ("x", "nan", "inf", "-1", 0):
        with pytest.raises(ValueError, match=f"inv_snr is {wrong}; accepted: a number from 1e-06 to"):
            SamplingOptions(inv_snr=wrong)


def test_models_sample_with_the_stored_filter_if_asked(tmp_path):
    fast = SamplingOptions("2", inv_snr=CALIBRATED)
    with pytest.raises(ValueError, match="loaded from files"):
        build(tmp_path).sample([0], None, fast, latent_steps="2")
    model = stored(tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        model.sample([0], None, fast, latent_steps="2")
    mollifier, ratios = model.process.mollifier, InverseSnr(0.25, (0.3, 0.5, 2.0))
    save_filter(tmp_path / "micro" / "weights.safetensors", mollifier, ratios, {})
    mollified = model.sample([0], (20, 30), fast, latent_steps="2", deblur=False)
    assert torch.equal(model.sample([0], (20, 30), fast, latent_steps="2"), mollifier.inverse(mollified, ratios))
    plain = model.sample([0], (20, 30), SamplingOptions("2"), latent_steps="2")
    assert torch.equal(plain, mollifier.inverse(mollified, 0.05))


@pytest.mark.parametrize("half", [False, True])
def test_a_saved_model_takes_its_filter_along(tmp_path, half, caplog):
    model, ratios = stored(tmp_path), InverseSnr(0.25, (0.3, 0.5, 2.0))
    model.sampling = SamplingOptions("2", inv_snr=CALIBRATED)
    with pytest.raises(ValueError, match="is not there"):
        model.save(tmp_path / "without")
    assert not (tmp_path / "without").exists()
    weights = tmp_path / "micro" / "weights.safetensors"
    save_filter(weights, model.process.mollifier, ratios, {"images": 3})
    again = InftyDiff.from_runs(model.save(tmp_path / "with", half=half), device="cpu")
    assert again.sampling == model.sampling and again.inverse_snr(CALIBRATED) == ratios
    x = torch.randn(1, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.deblur(x), model.process.mollifier.inverse(x, ratios))

    weights.write_bytes(weights.read_bytes() + b" ")  # other weights: the filter is not theirs
    model.sampling = SamplingOptions("2")
    folder = model.save(tmp_path / "other")
    assert not filter_path(folder / "image.safetensors").exists() and "it is not copied" in caplog.text


def test_the_command(root, tmp_path):  # noqa: F811
    asked = ("--num_images=1", f"--out_dir={tmp_path}", "--inv_snr=calibrated")
    fails(command("generate_recons", root, *asked), "weights.filter.json is not there")
    assert not list(tmp_path.iterdir())
    # An untrained model knows nothing of images; close to them it leaves what they show.
    start = ("--start_step=0.05", "--split=train", "--num_images=12", "--sample_batch_size=5")
    done = run([*command("calibrate_filter", root, *start), "--sampling_steps=50"])
    assert done.returncode == 0 and "written:" in done.stdout, done.stderr
    path = root / "micro" / "weights.filter.json"
    found = json.loads(path.read_text())
    assert found["images"] == 12 and found["start_step"] == 50 and found["psnr"] > found["psnr_0.05"]
    model = InftyDiff.from_runs(root / "micro", device="cpu")
    assert model.inverse_snr(CALIBRATED).values == tuple(found["inv_snr"])
    done = run(command("generate_recons", root, *asked))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["sampling"]["inv_snr"] == "calibrated" and len(report["filter"]) == 64 and kept(tmp_path)
    path.unlink()
