"""Models of fields: of points known in part, of several sizes, their latents, results and pictures."""

import dataclasses
import importlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dct, dctn, idctn

import micro
from benchmarks.fields import Kriging, estimates, spectrum_rows, station_picture, station_rows
from configs.validate import freeze
from data.datasets import open_dataset
from data.field_pictures import field_picture
from data.loader import batches, sequential
from data.units import FieldUnits
from diffusion import completion
from diffusion.completion import Moments, completed, measure_moments
from diffusion.conditioning import fill_hole, fill_unknown
from diffusion.coordinates import Points
from diffusion.random import Purpose, stream
from diffusion.sensors import Sensors
from diffusion.subsets import DRAWS, draw_points
from experiments.support.sensors import of_first_channel, read_sensors
from infty_diff import InftyDiff, SamplingOptions
from infty_diff.folder import FolderOptions, draw_folder
from known_answers import seeded
from runtime.precision import Precision
from runtime.stored import config_from
from test_commands import fails, run
from test_edit_commands import command
from training.image_stage import ImageStage


def masked(count, size, seed=0):
    """Fields (N, 2, H, W) of which about half is not known, alike in both channels."""
    generator = seeded(seed)
    x = torch.randn(count, 2, *size, generator=generator)
    return x.masked_fill(torch.rand(count, 1, *size, generator=generator) < 0.5, torch.nan)


@pytest.mark.parametrize("kind", DRAWS)
def test_unknown_points_are_never_drawn(kind):
    known = masked(40, (9, 14)).isfinite().all(1)
    least = int(known.flatten(1).sum(1).min())
    points = draw_points(kind, stream(0, Purpose.STEP), 40, (9, 14), least, "cpu", known=known)
    assert known.flatten(1).gather(1, points.index).all()
    assert all(len(set(row)) == least for row in points.index.tolist())
    fewest = int(known.flatten(1).sum(1).argmin())
    assert sorted(points.index[fewest].tolist()) == known[fewest].flatten().nonzero()[:, 0].tolist()
    everywhere = torch.ones_like(known)
    wanted = (40, (9, 14), 30, "cpu")
    same = [draw_points(kind, stream(0, Purpose.STEP), *wanted, known=k).index for k in (None, everywhere)]
    assert torch.equal(*same)


def test_unknown_points_are_filled_as_a_hole_is():
    x = masked(5, (9, 14)).double()
    x[3] = 1.5  # known everywhere
    filled = fill_unknown(x)
    assert torch.equal(filled[3], x[3])
    for i in (0, 1, 2, 4):
        mask = x[i].isfinite().all(0)
        assert torch.allclose(filled[i], fill_hole(x[i].nan_to_num(7.0)[None], mask)[0], atol=1e-12)


def waves_of(moments, size):
    """Columns of the covariance of fields with these moments, (P·2, P·2), by the definition of the cosine series."""
    waves = torch.kron(*(torch.from_numpy(dct(np.eye(n), norm="ortho", axis=0)) for n in size))  # (waves, points)
    return torch.einsum("wp,wij,wq->ipjq", waves, moments.at(size).flatten(0, 1), waves).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("part", [None, 0.3])
def test_completions_are_draws_given_what_is_known(monkeypatch, part):
    """With errors of known values as they are, which hardly matter here, and with large ones, which do."""
    if part is None:
        part = 1e-4
    else:
        monkeypatch.setattr(completion, "_NUGGET", part)
    generator, size = seeded(4), (5, 6)
    root = torch.randn(8, 2, 2, generator=generator).double() / torch.arange(1, 9)[:, None, None]
    moments = Moments(root @ root.mT + 1e-3 * torch.eye(2), (5, 7))
    field = torch.randn(1, 2, *size, generator=generator).double()
    known = torch.rand(size, generator=generator) < 0.5
    drawn = completed(field.masked_fill(~known, torch.nan).expand(3000, -1, -1, -1), moments, generator)
    assert torch.equal(drawn[..., known], field[..., known].expand(3000, -1, -1))
    covariance, seen = waves_of(moments, size), known.flatten().repeat(2)
    nugget = part * covariance.diagonal().view(2, -1).mean(1).repeat_interleave(30)[seen].diag()
    gain = covariance[~seen][:, seen] @ (covariance[seen][:, seen] + nugget).inverse()
    mean, found = gain @ field.flatten()[seen], drawn.flatten(1)[:, ~seen]
    left = covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen] + gain @ nugget @ gain.mT
    sd = left.diagonal().sqrt()
    assert ((found.mean(0) - mean).abs() < 5 * sd / 3000**0.5 + 1e-3 * sd).all()
    assert ((torch.cov(found.mT) - left).abs() < 6 * (sd[:, None] * sd) * (2 / 3000) ** 0.5).all()


def test_completed_fields_keep_the_spectrum_that_smooth_ones_lose():
    size, generator = (16, 13), seeded(5)
    k, l = (torch.arange(n).double() for n in size)  # noqa: E741
    amplitude = 1 / (1 + (k[:, None] ** 2 + l**2) / 8)
    white = torch.randn(64, 2, *size, generator=generator).double()
    white[:, 1] = 0.6 * white[:, 0] + 0.8 * white[:, 1]  # channels are correlated
    fields = torch.from_numpy(idctn((white * amplitude).numpy(), axes=(2, 3), norm="ortho"))
    partly = fields.masked_fill(torch.rand(64, 1, *size, generator=generator) < 0.5, torch.nan)
    whole = completed(partly, measure_moments(partly, generator), generator)
    band = (amplitude < 0.2) & (amplitude > 0.04)

    def power(x, y):
        x, y = (dctn(v.numpy(), axes=(2, 3), norm="ortho")[:, c][:, band] for v, c in ((x, 0), (x, y)))
        return float((x * y).mean())

    for y, room in ((0, 0.04), (1, 0.06)):
        assert power(whole, y) / power(fields, y) == pytest.approx(1, abs=room)
    assert power(fill_unknown(partly), 0) / power(fields, 0) < 0.75


def written_run(root, **changes):
    """A configuration for fields of two sizes, which are written."""
    (root / "data").mkdir()
    for name, count, size in (("a", 9, (16, 13)), ("b", 6, (9, 21))):
        np.save(root / "data" / f"{name}.npy", masked(count, size, count) * 5 + 270)
    data = {"name": "fields", "root_dir": str(root / "data"), "channels": 2, "img_size": 16, "img_width": 13}
    return micro.image(root, {**{f"data.{k}": v for k, v in data.items()}, "data.val_ratio": 0.2, **changes})


def test_networks_see_known_points_alone_and_in_proportion(tmp_path):
    config = written_run(tmp_path, **{"mc_integral.q_sample": 60})
    train, val = (open_dataset(config.data, split) for split in ("train", "val"))
    stage, seen = ImageStage(config, train, val, Precision(torch.device("cpu"), None)), []
    for module in stage.modules.values():
        module.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    counts = set()
    for batch in itertools.islice(stage.batches(0), 4):
        seen.clear()
        loss, *_ = stage.loss(batch, stage.draw(stream(0, Purpose.STEP), 4, slice(None), batch))
        assert loss.isfinite() and len(seen) == 2
        batch, whole = batch.split(2, dim=1)
        known = batch.isfinite().all(1).flatten(1)
        assert whole.isfinite().all() and torch.equal(whole[~batch.isnan()], batch[~batch.isnan()])
        for values, points in seen:
            assert values.isfinite().all() and known.gather(1, points.index).all()
        encoded = next(values for values, points in seen)
        assert torch.equal(encoded, batch.flatten(2).gather(2, seen[0][1].index[:, None].expand(-1, 2, -1)).mT)
        size = tuple(batch.shape[2:])
        least = min(some.least_known[size] for some in (train, val) if size in some.least_known)
        assert points.count == min(60 * math.prod(size) // (16 * 13), least)
        counts.add(size)
    assert counts == {(16, 13), (9, 21)}
    assert math.isfinite(stage.held_out_loss(stage.modules))
    rows = stage.previews(stage.modules)
    assert stage.shown.isnan().any() and rows["deblurred"].isfinite().all()
    stage.config = dataclasses.replace(config, data=dataclasses.replace(config.data, origin="lower"))
    turned = stage.previews(stage.modules)
    assert all(torch.equal(turned[name].nan_to_num(9), row.flip(2).nan_to_num(9)) for name, row in rows.items())
    stage.config = config
    assert stage.facts["units"] == dataclasses.asdict(train.units)


class Ids:
    """A data set whose items are their own numbers, with the sizes of another."""

    pixels = None

    def __init__(self, data):
        self.data, self.groups = data, data.groups

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return torch.full((1, *self.data[i].shape[1:]), i, dtype=torch.uint8)


def test_completed_fields_count_as_known_where_asked(tmp_path):
    config = written_run(tmp_path, **{"data.unknown": "complete", "mc_integral.ratio": 1.0})
    train, val = (open_dataset(config.data, split) for split in ("train", "val"))
    stage, seen = ImageStage(config, train, val, Precision(torch.device("cpu"), None)), []
    stage.modules["denoiser"].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    items = torch.cat([item.flatten() for item in stage._read[0]])
    given = torch.cat([train[i].flatten() for i in range(len(train))])
    assert items.isfinite().all() and torch.equal(items[given.isfinite()], given[given.isfinite()])
    for batch in itertools.islice(stage.batches(0), 4):
        loss, *_ = stage.loss(batch, stage.draw(stream(0, Purpose.STEP), 4, slice(None), batch))
        assert batch.shape[1] == 2 and loss.isfinite() and seen.pop().is_full
    assert math.isfinite(stage.held_out_loss(stage.modules))


def test_sizes_take_turns_and_resuming_is_exact(tmp_path):
    config = written_run(tmp_path, **{"data.val_ratio": 0.0})
    data = open_dataset(config.data, "train")
    assert data.pixels is None and [len(group) for group in data.groups] == [6, 9]
    ids = Ids(data)
    order = [b[:, 0, 0, 0].tolist() for b in itertools.islice(batches(ids, 4, seed=3, flip=False), 50)]
    sizes = [len({i in data.groups[0] for i in batch}) for batch in order]
    assert set(sizes) == {1}
    assert [sum(batch[0] in data.groups[0] for batch in order[s : s + 15]) for s in (0, 15, 30)] == [6, 6, 6]
    for done in (1, 4, 15, 31):
        rest = itertools.islice(batches(ids, 4, seed=3, seen=4 * done, flip=False), 50 - done)
        assert [b[:, 0, 0, 0].tolist() for b in rest] == order[done:]
    for rank in (0, 1):
        share = itertools.islice(batches(ids, 4, seed=3, flip=False, rank=rank, world_size=2), 20)
        assert [b[:, 0, 0, 0].tolist() for b in share] == [batch[2 * rank :][:2] for batch in order[:20]]
    first = [batch for batch in order if batch[0] in data.groups[0]]
    assert sorted(itertools.chain(*first[:3])) == sorted(data.groups[0] * 2)  # two epochs of six items
    once = [b[:, 0, 0, 0].tolist() for b in sequential(ids, 4)]
    assert list(itertools.chain(*once)) == list(range(15)) and [len(b) for b in once] == [4, 2, 2, 4, 3]


def test_latents_are_of_the_known_points(tmp_path):
    config = written_run(tmp_path)
    model = InftyDiff(config, **micro.networks(config), units=FieldUnits((0.0, 0.0), (1.0, 1.0), ("u", "v")))
    x = masked(3, (16, 13))
    x[1] = x[1].nan_to_num()
    found = model.encode(x)
    for field, latent in zip(x, found):
        ids = field.isfinite().all(0).flatten().nonzero().T
        assert torch.allclose(model.encode(field.nan_to_num(3.0)[None], Points((16, 13), ids))[0], latent, atol=1e-6)
    with pytest.raises(ValueError, match="no known pixel"):
        model.encode(torch.full((1, 2, 16, 13), torch.nan))


def test_units_are_stored_with_weights_and_configurations_without_fields_load(tmp_path):
    config = written_run(tmp_path)
    units = FieldUnits((1.0, -3.0), (0.5, 2.0), ("u", "v"))
    InftyDiff(config, **micro.networks(config), units=units).save(tmp_path / "saved")
    assert InftyDiff.from_runs(tmp_path / "saved", device="cpu").units == units
    plain = {"data": {"name": "functions", "channels": 1}, "model": {}}
    assert config_from(plain, type(config), "there").data.fields == ""
    for known in ({"offset": [1], "scale": [0], "names": ["u"]}, {"offset": [1]}, 3):
        with pytest.raises(ValueError, match="units of fields"):
            FieldUnits.stored({"units": known}, "weights")


def test_commands_give_results_in_the_units_of_the_data(tmp_path):
    config = written_run(tmp_path)
    units = FieldUnits((270.0, -3.0), (8.0, 0.5), ("u", "v"))
    model = InftyDiff(config, **micro.networks(config), units=units)
    saved = model.save(tmp_path / "saved")
    run_folder = tmp_path / "micro"
    run_folder.mkdir()
    (saved / "image.safetensors").rename(run_folder / "weights.safetensors")
    micro.write_prior(micro.latent(tmp_path))
    sensors = tmp_path / "sensors.csv"
    sensors.write_text("y,x,value1,value2\n0.5,0.25,272,-2.9\n0.6,0.7,266,\n")
    size, out = "--sample_img_size=9x11", tmp_path / "out"
    done = run(
        command("condition", tmp_path, f"--sensors={sensors}", "--sd=0.5", "--seeds=0,1", f"--out_dir={out}", size)
    )
    assert done.returncode == 0 and "3 measurements" in done.stdout, done.stderr
    drawn = np.stack([np.load(out / "raw" / f"00000{seed}.npy") for seed in (0, 1)])
    assert drawn.shape == (2, 2, 9, 11) and abs(drawn[:, 0].mean() - 270) < 16 and abs(drawn[:, 1].mean() + 3) < 1
    np.testing.assert_allclose(np.load(out / "mean.npy"), drawn.mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.load(out / "sd.npy"), drawn.std(0, ddof=1), rtol=1e-2, atol=1e-3)
    picture = Image.open(out / "mean.png")
    assert picture.size == tuple(field_picture(torch.zeros(2, 9, 11), units).shape[:0:-1])
    sensors.write_text("y,x,value1,value2\n0.5,0.25,27,-2.9\n")
    fails(
        command("condition", tmp_path, f"--sensors={sensors}"), "values of channel 1 go from 27 to 27; accepted: about"
    )

    loaded = InftyDiff.from_runs(run_folder, tmp_path / "micro_sampler", device="cpu")
    options = FolderOptions((9, 11), SamplingOptions("3"), "3", save_raw=True)
    assert [draw_folder(loaded, tmp_path / "samples", [4, 5], options, {}) for _ in range(2)] == [2, 0]
    stored = np.load(tmp_path / "samples/fields/000004.npy")
    sample = loaded.sample([4], (9, 11), SamplingOptions("3"), latent_steps="3")[0]
    np.testing.assert_allclose(stored, units.undo(sample), rtol=1e-5, atol=1e-3)
    (tmp_path / "samples/fields/000005.npy").unlink()
    assert draw_folder(loaded, tmp_path / "samples", [4, 5], options, {}) == 1


def test_sensors_in_units_are_those_of_the_model(tmp_path):
    units, path = FieldUnits((270.0, -3.0), (8.0, 0.5), ("u", "v")), tmp_path / "a.csv"
    path.write_text("y,x,value1,value2,sd\n0.5,0.25,274,-3.5,0.4\n0.6,0.7,266,,0.8\n")
    found = read_sensors(str(path), 2, 9.0, units)
    assert found.readings.tolist() == [0.5, -0.5, -1.0]
    assert torch.allclose(found.variance.sqrt(), torch.tensor([0.05, 0.1, 0.8]).double())
    image = torch.rand(1, 2, 5, 6, generator=seeded(0)).double()
    plain = Sensors(torch.tensor([[0.5, 0.25], [0.6, 0.7]]), torch.tensor([[1.0, 1.0], [1.0, math.nan]]), 0.1)
    seen = (given.observer(torch.device("cpu"))(image) for given in (found, plain))
    assert torch.allclose(*seen)
    assert of_first_channel(found).values.tolist() == [[0.5], [-0.5]]


def test_pictures_have_a_colour_for_each_value_and_grey_where_none_is_known():
    units = FieldUnits((10.0,), (2.0,), ("temperature",))
    values = torch.full((1, 20, 30), 8.0)
    values[0, :, 10:], values[0, :, 20:] = 12.0, torch.nan
    picture = field_picture(values, units)
    y, x = picture.shape[1] // 2, [8 + 180 * k // 6 for k in (1, 3, 5)]
    assert [tuple(picture[:, y, place].tolist()) for place in x] == [(68, 1, 84), (253, 231, 37), (190, 190, 190)]
    upside_down = values.clone()
    upside_down[0, :5] = 12.0
    assert field_picture(upside_down, units, origin="lower").equal(field_picture(upside_down.flip(1), units))
    bar = picture[:, 8, 8 + 180 + 8 + 2], picture[:, 8 + 119, 8 + 180 + 8 + 2]
    assert [tuple(colour.tolist()) for colour in bar] == [(253, 231, 37), (68, 1, 84)]
    narrow = FieldUnits((10.0,), (2.0,), ("temperature",), common=((8.0, 10.0),))  # rare values beyond have its ends
    assert field_picture(values - 2, narrow, [(8.0, 10.0)]).equal(field_picture(values - 2, narrow))
    assert not field_picture(values - 2, narrow).equal(field_picture(values - 2, units))
    for ends in ((9.0, 8.0), (float("nan"), 9.0)):
        with pytest.raises(ValueError, match="common"):
            FieldUnits((10.0,), (2.0,), ("temperature",), common=(ends,))


def test_the_example_solves_the_heat_equation(tmp_path):
    script, file = Path(__file__).parents[1] / "examples/heat_fields.py", tmp_path / "heat.npz"
    subprocess.run([sys.executable, script, file, "3"], check=True)
    fields = np.load(file)
    before, after = (dctn(fields[name].astype(float), axes=(1, 2), type=2) for name in ("before", "after"))
    k = np.arange(32)
    assert np.allclose(after, before * np.exp(-0.002 * np.pi**2 * (k[:, None] ** 2 + k**2)), atol=1e-2)
    config = freeze(importlib.import_module("configs.heat_config").get_config())
    subprocess.run([sys.executable, script, file, "40", "0.5"], check=True)
    data = open_dataset(dataclasses.replace(config.data, root_dir=str(file)), "train")
    assert data.partly_known and 350 < data.least_known[32, 32] < 520 and data.units.names == ("before", "after")


def test_kriging_of_the_benchmark_is_the_gaussian_posterior(tmp_path):
    size, ids, sd = (5, 6), torch.tensor([0, 7, 20, 29]), 0.1
    fields = torch.randn(400, *size, generator=seeded(0)).double().cumsum(2) + 3
    for stationary in (False, True):
        kriging = Kriging(fields, stationary)
        precision = kriging.covariance.inverse()  # of the joint law, in information form
        seen = torch.zeros(30, dtype=torch.float64)
        seen[ids] = sd**-2
        covariance = (precision + torch.diag(seen)).inverse()
        values = torch.tensor([2.0, 3.5, 1.0, 4.0]).double()
        shift = torch.zeros(30, dtype=torch.float64)
        shift[ids] = (values - kriging.mean[ids]) / sd**2
        mean, deviation = kriging.given(ids, values, sd)
        assert torch.allclose(mean, kriging.mean + covariance @ shift, atol=1e-6)
        assert torch.allclose(deviation, covariance.diagonal().sqrt(), atol=1e-6)
    variance = Kriging(fields, False).covariance.trace()
    assert torch.allclose(Kriging(fields, True).covariance.trace(), variance)  # Parseval
    config = micro.image(tmp_path, {"data.channels": 1})
    model = InftyDiff(config, **micro.networks(config))
    train = fields[:40, None].repeat_interleave(2, 2).repeat_interleave(2, 3).float() / 20
    found = estimates(model, train, train[:1], seeds=2, steps=2)
    assert station_picture(found[0], tuple(train.shape[2:]), 2.0, origin="lower").dtype == torch.uint8
    rows = station_rows(found, 1.0)
    assert [row["method"] for row in rows] == ["posterior", "kriging, stationary", "kriging, empirical"]
    assert all(math.isfinite(row["rmse"]) and 0 <= row["coverage"] <= 1 for row in rows)
    lattice = torch.ones(1, 16, 16, dtype=torch.float64)
    powers = spectrum_rows(
        {"partly": 3 * lattice, "complete": 2 * lattice} | dict.fromkeys(("data", "smooth", "completed"), lattice)
    )
    assert all((row["partly/complete"], row["complete/data"]) == (1.5, 2.0) for row in powers) and len(powers) == 6
    assert [round(256 * row["share"]) for row in powers][:2] == [1, 3]  # wave (0, 0); waves (0, 1), (1, 0), (1, 1)
