"""Nearest training images: copies, mirrored and resized ones are found, in the order of the exact distance."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from metrics.extractors import pixels_extractor
from metrics.features import Extraction
from metrics.images import Mirrored
from metrics.nearest import nearest, pixel_distance, random_features_distance
from pictures import folder, images_of, noise
from test_commands import fails, run

CPU = torch.device("cpu")
SCRIPT = "experiments/nearest_neighbours.py"


@pytest.fixture
def training(tmp_path):
    return folder(tmp_path / "training", 12)


def search(samples, views, distance, tmp_path, **options):
    how = Extraction(batch_size=5, threads=2, cache_dir=tmp_path / "cache")
    return nearest(samples, views, distance, pixels_extractor(CPU), how, **{"count": 3, "shortlist": 6, **options})


@pytest.mark.parametrize("distance", [pixel_distance, random_features_distance(CPU)])
def test_training_images_find_themselves(training, tmp_path, distance):
    images = images_of(training)
    for i, row in enumerate(search(images, [images], distance, tmp_path)):
        assert row[0].index == i and row[0].distance == pytest.approx(0, abs=1e-6)
        assert [n.distance for n in row] == sorted(n.distance for n in row) and row[1].distance > 0.01


def test_mirror_images_are_found_once_per_image(training, tmp_path):
    images = images_of(training)
    views = [images, Mirrored(images)]
    for i, row in enumerate(search(Mirrored(images), views, pixel_distance, tmp_path)):
        assert (row[0].view, row[0].index, row[0].distance) == (1, i, 0.0)
        assert len({n.index for n in row}) == 3


def test_the_order_is_that_of_the_exact_distance(training, tmp_path):
    images, samples = images_of(training), images_of(folder(tmp_path / "samples", 2, first_seed=50))
    for i, row in enumerate(search(samples, [images], pixel_distance, tmp_path, shortlist=12, count=12)):
        squares = [((images[j].astype(float) - samples[i].astype(float)) ** 2).mean() for j in range(12)]
        assert [n.index for n in row] == list(np.argsort(squares))
        assert row[0].distance == pytest.approx(min(squares) ** 0.5 / 127.5, rel=1e-5)


def test_samples_of_another_size(training, tmp_path):
    enlarged = tmp_path / "samples"
    enlarged.mkdir()
    images = images_of(training)
    Image.fromarray(images[4]).resize((72, 60), Image.Resampling.BICUBIC).save(enlarged / "a.png")
    (row,) = search(images_of(enlarged), [images], random_features_distance(CPU), tmp_path)
    assert row[0].index == 4


def test_the_command_writes_picture_and_table(training, tmp_path):
    samples = tmp_path / "samples"
    samples.mkdir()
    Image.fromarray(images_of(training)[7]).save(samples / "copy.png")
    Image.fromarray(noise((20, 24), 99)).save(samples / "new.png")
    common = [SCRIPT, f"--samples={samples}", f"--cache_dir={tmp_path / 'cache'}", "--device=cpu"]
    done = run([*common, f"--reference={training}", "--metric=random_features", "--neighbours=4"])
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "samples_nearest_neighbours/random_features.json").read_text())
    first, second = report["nearest"]
    assert first["sample"] == "copy.png" and first["neighbours"][0] == {"image": "part1/0003.png", "distance": 0.0}
    assert len(second["neighbours"]) == 4 and second["neighbours"][0]["distance"] > 0.01
    assert [part["images"] for part in report["training"]] == [12, 12]
    with Image.open(tmp_path / "samples_nearest_neighbours/random_features.png") as picture:
        assert picture.height > 2 * 128
    fails([*common, f"--reference={training}", "--metric=pixels", "--num_samples=3"], "num_samples is 3")
