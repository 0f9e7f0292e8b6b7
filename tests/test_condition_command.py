"""Functions given sensors, from Python and by the command: files, going on, and wrong input in one line."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import micro
from diffusion.coordinates import Points, image_to_points, points_to_image
from diffusion.sensors import Sensors
from experiments.support.sensors import moments, read_sensors, with_sensors
from infty_diff import InftyDiff, SamplingOptions
from known_answers import seeded
from runtime.lock import FolderLock
from test_commands import fails, run
from test_edit_commands import command
from test_generation import Optimal, build

FAST = SamplingOptions(3)
TABLE = "y,x,value1,value2,value3,sd,height,width\n0.5,0.25,0.1,0.2,,0.1,0,0\n\n0.6,0.7,-0.5,0,0.5,0,0.2,0.1\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Both stages of an untrained model, and sensors."""
    root = tmp_path_factory.mktemp("condition")
    micro.write_run(micro.image(root))
    micro.write_prior(micro.latent(root))
    (root / "sensors.csv").write_text(TABLE)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InftyDiff:
    return build(tmp_path_factory.mktemp("model"))


def sensors(channels: int = 3) -> Sensors:
    generator = seeded(3)
    return Sensors(torch.rand(6, 2, generator=generator), torch.rand(6, channels, generator=generator) - 0.5, 0.02)


class OptimalImage(Optimal):
    """The optimal prediction of standard normal x_0 itself, √ᾱ T⁻¹ x_t."""

    def __init__(self, process):
        super().__init__(process)
        self.sharpen = process.mollifier.inverse

    def forward(self, x, *rest):
        time = next(r for r in rest if isinstance(r, torch.Tensor))
        points = next(r for r in rest if isinstance(r, Points))
        sharp = image_to_points(self.sharpen(points_to_image(x, points.size), 1e-3))
        return sharp * self.schedule.at("sqrt_alpha_bar", time.round().long(), x)


@pytest.mark.parametrize(
    ("mean_type", "sharp", "size"),  # sizes: that of training; above it, odd
    [
        ("mollified_epsilon", False, (16, 12)),
        ("mollified_epsilon", True, (24, 31)),
        ("xstart", False, (16, 12)),
        ("xstart", True, (16, 12)),
    ],
)
def test_measurements_are_met(tmp_path, mean_type, sharp, size):
    config, given = micro.image(tmp_path, {"diffusion.model_mean_type": mean_type}), sensors()
    model = InftyDiff(config, **micro.networks(config))
    network = OptimalImage if mean_type == "xstart" else Optimal
    model = InftyDiff(config, model.encoder, network(model.process))
    found = model.posterior(given, [3], size, SamplingOptions("20", clip=False), sharp=sharp, deblur=sharp)
    assert found.shape == (1, 3, *size) and not found.requires_grad
    missed = given.observer(torch.device("cpu"))(found)[0] - given.readings
    assert missed.abs().max() < 5 * 0.02  # standard deviations of their errors


def test_every_seed_is_alone_and_latents_may_be_drawn_in_turn(model):
    given = sensors()
    together = model.posterior(given, [4, 9], options=FAST)
    alone = model.posterior(given, [9], options=FAST)
    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=0)
    calls = []
    drawn = model.posterior(given, [4], options=FAST, latents="prior", rounds=2, latent_steps=4,
                            callback=lambda *_: calls.append(0))  # fmt: skip
    once = model.posterior(given, [4], options=FAST, latents="prior", latent_steps=4)
    assert len(calls) == 6 and not torch.equal(drawn, once) and not torch.equal(once, together[:1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sensors": sensors(1)}, "sensors measure 1 channels; accepted: 3"),
        ({"latents": "mean"}, "latents is 'mean'; accepted: sensors, prior, or a tensor"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_wrong_arguments_are_named(model, given, message):
    with pytest.raises(ValueError, match=message):
        model.posterior(**{"sensors": sensors(), "options": FAST, **given})


def test_tables_arrays_and_pictures(tmp_path):
    (tmp_path / "a.csv").write_text(TABLE)
    found = read_sensors(str(tmp_path / "a.csv"), 3, 9.0)
    assert found.places.tolist() == [[0.5, 0.25], [0.6, 0.7]] and found.sides.tolist() == [[0, 0], [0.2, 0.1]]
    assert found.sd.tolist() == [0.1, 0.0] and found.readings.tolist() == [0.1, -0.5, 0.2, 0.0, 0.5]
    np.savez(tmp_path / "b.npz", y=np.float32([0.5, 0.6]), x=[0.25, 0.7], value=found.values.numpy())
    arrays = read_sensors(str(tmp_path / "b.npz"), 3, 9.0)
    assert torch.equal(arrays.values.nan_to_num(7), found.values.nan_to_num(7)) and arrays.sd.tolist() == [9.0, 9.0]
    pixels = np.zeros((4, 5, 4), np.uint8)
    pixels[1, 3] = (255, 0, 0, 255)
    pixels[3, 0] = (0, 0, 255, 255)
    Image.fromarray(pixels).save(tmp_path / "c.png")
    picture = read_sensors(str(tmp_path / "c.png"), 3, 0.0)
    assert picture.places.tolist() == [[1.5 / 4, 3.5 / 5], [3.5 / 4, 0.5 / 5]]
    assert picture.values.tolist() == [[1, -1, -1], [-1, -1, 1]]
    shown = with_sensors(None, picture, (4, 5))
    y, x = (round(float(p) * n) for p, n in zip(picture.places[0], shown.shape[1:]))
    assert shown[:, y, x].tolist() == [1, -1, -1] and shown[:, 0, 0].abs().max() < 0.01
    assert with_sensors(None, picture, (4, 5), "lower")[:, shown.shape[1] - 1 - y, x].tolist() == [1, -1, -1]


def test_moments(tmp_path):
    values = np.random.default_rng(0).normal(3, 1, (5, 2, 3)).astype(np.float32)
    files = [tmp_path / f"{i}.npy" for i in range(5)]
    for file, value in zip(files, values):
        np.save(file, value)
    mean, sd = moments(files, (2, 3))
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(sd, values.std(0, ddof=1), rtol=1e-5)
    assert moments(files[:1], (2, 3))[1].abs().max() == 0


def test_the_command_writes_samples_moments_and_a_sheet_and_goes_on(root, tmp_path):
    given = command("condition", root, f"--sensors={root / 'sensors.csv'}", "--seeds=3,5", f"--out_dir={tmp_path}",
                    "--sample_img_size=20x18")  # fmt: skip
    done = run(given)
    assert done.returncode == 0 and "2 made, 0 were there" in done.stdout, done.stderr
    samples = np.stack([np.load(tmp_path / "raw" / f"00000{seed}.npy") for seed in (3, 5)])
    assert samples.shape == (2, 3, 20, 18) and samples.dtype == np.float32
    np.testing.assert_allclose(np.load(tmp_path / "mean.npy"), samples.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "sd.npy"), samples.std(0, ddof=1), atol=1e-6)
    for name in ("000003", "mean", "sd"):
        assert Image.open(tmp_path / f"{name}.png").size == (18, 20)
    given_sensors = read_sensors(str(root / "sensors.csv"), 3, 0.01)
    missed = given_sensors.observer(torch.device("cpu"))(torch.from_numpy(samples).double()) - given_sensors.readings
    rows = json.loads((tmp_path / "result.json").read_text())["results"]
    assert rows[0]["misfit"] == pytest.approx(math.sqrt(float(missed[0].square().mean())), abs=1e-5)
    assert [row.get("seed") for row in rows] == [3, 5, None, None] and (tmp_path / "sheet.png").exists()

    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*.*") if path.name != "sheet.png"}
    (tmp_path / "raw" / "000005.npy").unlink()
    raw = tmp_path / "raw" / "000003.npy"
    raw.write_bytes(raw.read_bytes()[:-1] + b"x")
    with FolderLock(tmp_path):
        fails([*given, "--dry_run"], f"{tmp_path}: in use by process {os.getpid()}")
    fails([*given, "--sharp", "--dry_run"], "holds results of other settings")
    assert run([*given, "--dry_run"]).returncode == 0 and not (tmp_path / "raw" / "000005.npy").exists()
    done = run(given)
    assert "2 made, 0 were there" in done.stdout, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*.*") if path.name != "sheet.png"} == before


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", "y,x,value\n0.5,0.5,0.1\n", "has values of 1 channels; accepted: 3"),
        ("a.csv", "y,x,value1,value2,value3\n0.5,1.5,0,0,0\n", "sensor 1 is at y 0.5, x 1.5; accepted: places from 0"),
        ("a.csv", "y,x,value1,value2,value3,sd\n.5,.5,0,0,0,0\n.5,.5,1,1,1,0\n", "sensors 1 and 2 are at one place"),
        ("a.csv", "y,x,value1,value2,value3,sd\n.5,.5,0,0,0,-1\n", "sd of sensors is -1; accepted"),
        ("a.csv", "y,x,value1,value2,value3,sd\n.5,.5,0,0,0,nan\n", "sd of sensors is nan; accepted"),
        ("a.csv", "y,x,value1,value2,value3\n", "has 0 sensors; accepted: 1 to 100000"),
        ("a.csv", "y,x,value1,value2,value3\n.5,.5,,,\n", "measurements are none"),
        ("a.csv", "y,x,value1,value2,value3\n.5,.5,0,90,0\n", "values reach 90; accepted: values of images in [-1, 1]"),
        ("a.csv", "y,x,value1,value2,value3\n.5,here,0,0,0\n", "sensor 1 is .5,here,0,0,0, which are not numbers"),
        ("a.csv", "y,x,value1\n.5,.5\n", "sensor 1 has 2 columns; accepted: the 3 of the header"),
        ("a.csv", "lat,lon,value\n0.5,0.5,0.1\n", "'lat' is no column; accepted: a .csv or .npz"),
        ("a.csv", "", "holds no line; accepted"),
        ("a.npz", "no archive", "accepted: a .csv or .npz"),
        ("a.txt", TABLE, "of another kind; accepted: a .csv or .npz"),
        ("a.png", "no image", "accepted"),
        (None, "", "No such file or directory; accepted"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, name, content, part):
    path = tmp_path / (name or "none.csv")
    if name:
        path.write_text(content)
    with pytest.raises(ValueError) as raised:
        read_sensors(str(path), 3, 0.01)
    message = str(raised.value)
    assert message.startswith(f"--sensors is {path}: ") and part in message and "\n" not in message


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ([], "--sensors is missing"),
        (["--sensors=none.csv"], "--sensors is none.csv: No such file"),
        (["--sensors={root}/sensors.csv", "--latents=prior"], "accepted: prior, with --decoder_config"),
        (["--sensors={root}/sensors.csv", "--sd=-1"], "--sd"),
    ],
)
def test_wrong_commands_are_one_line_and_leave_nothing(root, tmp_path, extra, part):
    given = [argument.format(root=root) for argument in extra]
    fails(command("condition", root, f"--out_dir={tmp_path / 'out'}", *given), part)
    assert not (tmp_path / "out").exists()
