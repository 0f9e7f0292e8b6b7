"""The paper's claims in numbers: what is made of held-out images, and how near samples are to training images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import micro
from data.datasets import open_dataset
from forked import run
from metrics.nearest import nearest_rows

IMAGES = {"data.num_images": 40, "data.val_ratio": 0.2}


def test_the_nearest_rows_of_all_blocks():
    generator = torch.Generator().manual_seed(0)
    queries, known = (torch.randn(n, 6, generator=generator) for n in (7, 30))
    known[17] = queries[3]
    distance, number = nearest_rows(queries, known.split([4, 11, 15]))
    exact = (queries.double()[:, None] - known.double()).norm(dim=2)
    assert number.tolist() == exact.argmin(1).tolist() and distance[3] == 0
    torch.testing.assert_close(distance.double(), exact.amin(1))


def test_copies_are_nearer_than_held_out_images(tmp_path):
    training = open_dataset(micro.image(tmp_path, IMAGES).data, "train")
    (tmp_path / "copies").mkdir()
    for i in range(5):
        Image.fromarray(training[3 * i].permute(1, 2, 0).numpy()).save(tmp_path / f"copies/{i}.png")
    data = {"data.img_size": 16, "data.img_width": 12, **IMAGES, "run.root_dir": tmp_path}
    settings = micro.arguments("config", data)
    done = run(["experiments/memorisation.py", "--config=configs/tiny_config.py", *settings, "--device=cpu",
                "--model=random_features", f"--samples={tmp_path}/copies", f"--cache_dir={tmp_path}"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "copies_memorisation"
    report = json.loads((out / "memorisation.json").read_text())
    assert (report["samples"], report["held out"], report["training"]) == (5, 5, 40)
    for way in report["by"].values():
        assert max(way["samples"].values()) == 0 and way["nearer"] == 1 and way["held out"]["least"] > 0
    assert "5 samples, 5 held out, 40 training" in done.stdout and (out / "memorisation.png").exists()


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """What restoration.py left of an untrained model, and the arguments."""
    root = tmp_path_factory.mktemp("restoration")
    micro.write_run(micro.image(root, IMAGES))
    place = {"run.root_dir": root, "run.experiment": "micro", "run.device": "cpu"}
    command = ["experiments/restoration.py", "--config=configs/tiny_config.py", *micro.arguments("config", place),
               "--sample_img_size=32x24", "--num_images=2", "--sampling_steps=2", "--model=random_features",
               f"--cache_dir={root}", f"--out_dir={root}/out"]  # fmt: skip
    done = run(command)
    assert done.returncode == 0, done.stderr
    return root, command, json.loads((root / "out/restoration.json").read_text())


def test_every_method_is_measured_against_the_images(restored):
    root, _, report = restored
    data = replace(micro.image(root, IMAGES).data, img_size=32, img_width=24)
    truth = open_dataset(data, "val")
    rows = {row["method"]: row for row in report["rows"]}
    assert len(rows) == 8 and all(np.isfinite(row["distance"]) for row in rows.values())
    found = []
    for i in range(2):
        # A mean of 2 × 2 pixels is not how images are reduced here, but bicubic interpolation of it is as good.
        low = torch.nn.functional.avg_pool2d(truth[i][None].double(), 2)
        fine = torch.nn.functional.interpolate(low, (32, 24), mode="bicubic").clamp(0, 255)
        found.append(10 * torch.log10(255**2 / (fine - truth[i]).square().mean()))
    assert rows["finer: bicubic interpolation"]["psnr"] == pytest.approx(float(sum(found)) / 2, abs=0.5)
    for i, name in enumerate(("hole_smooth", "hole_guidance")):
        filled = np.asarray(Image.open(root / f"out/{name}/00000{i}.png")).transpose(2, 0, 1)
        known = np.ones((32, 24), dtype=bool)
        known[8:20, 8:18] = False
        assert (filled[:, known] == truth[i].numpy()[:, known]).all() and (filled != truth[i].numpy()).any()


def test_it_goes_on_and_refuses_what_it_cannot_measure(restored):
    root, command, _ = restored
    made = {path: path.stat().st_mtime_ns for path in (root / "out").glob("*/0*.png")}
    assert len(made) == 14
    assert run([*command, "--methods=finer_bicubic,hole_smooth"]).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for wrong, said in (("--methods=finer", "'finer' is none"), ("--num_images=5", "at most half of the 8 held out")):
        done = run([*command, wrong])
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
