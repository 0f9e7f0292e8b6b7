"""experiments/calculate_fid.py as users type it."""

import json
import shutil

import numpy as np
import pytest
import torch

import micro
from configs.effects import training_only
from metrics.extractors import open_extractor
from metrics.features import Extraction, features
from metrics.frechet import frechet_distance, gaussian_of
from metrics.images import DatasetImages, Mirrored
from pictures import folder, zipped
from runtime.claimed import claim_folder, save_png
from test_commands import fails, run

MANIFEST = {"settings": {"size": [16, 12]}, "model": {}}
SCRIPT = "experiments/calculate_fid.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two folders of pictures, and a folder of samples with their mollified originals."""
    place = tmp_path_factory.mktemp("fid")
    folder(place / "a", 9)
    folder(place / "b", 8, first_seed=40)
    drawn = place / "drawn"
    (drawn / "raw").mkdir(parents=True)
    data = DatasetImages(micro.image(place), "train", 3)
    mark = claim_folder(drawn, "manifest.json", MANIFEST)
    for i in range(6):
        save_png(drawn / f"{i:06d}.png", torch.from_numpy(data[i]).permute(2, 0, 1), mark, {"seed": str(i)})
        values = torch.from_numpy(data[i]).permute(2, 0, 1).float() / 127.5 - 1
        np.save(drawn / "raw" / f"{i:06d}.npy", values.numpy())
    shutil.copy(drawn / "000000.png", drawn / "contact_sheet.png")
    shutil.copy(place / "a" / "part0" / "0000.png", drawn / "000099.png")  # another's
    return place


def command(place, samples: str, *extra: str) -> list[str]:
    return [SCRIPT, f"--samples={place / samples}", "--device=cpu", f"--cache_dir={place / 'cache'}", *extra]


def tiny(place, **changes) -> list[str]:
    fields = {path: value for path, value in micro.IMAGE.items() if not training_only(path)}
    fields |= {"run.root_dir": place, **changes}
    return ["--config=configs/tiny_config.py", *micro.arguments("config", fields)]


def test_folders_and_zips_give_one_report(place):
    random = "--model=random_features"
    done = run(command(place, "a", f"--reference={place / 'b'}", random))
    assert done.returncode == 0, done.stderr
    assert "(not FID_CLIP)" in done.stdout and "warning: 9 samples for 112 feature dimensions" in done.stdout
    report = json.loads((place / "a" / "fid_random_features.json").read_text())
    assert report["extractor"]["name"] == "random_features" and report["protocol"] == "clean"
    assert (report["num_samples"], report["num_reference"]) == (9, 8)
    assert report["samples"]["size"] == [20, 24] and report["fid"] > 0 and 0 <= report["precision"] <= 1

    zipped(place / "a", place / "a.zip")
    zipped(place / "b", place / "b.zip")
    done = run(command(place, "a.zip", f"--reference={place / 'b.zip'}", random))
    assert done.returncode == 0, done.stderr
    from_zip = json.loads((place / "a_fid_random_features.json").read_text())
    for name in ("fid", "kid", "precision", "recall"):
        assert from_zip[name] == pytest.approx(report[name], rel=1e-6)

    done = run(command(place, "a", f"--reference={place / 'b'}", random, f"--json={place / 'again.json'}"))
    assert "features of 8 reference images from" in done.stderr
    assert json.loads((place / "again.json").read_text()) == report


def test_the_reference_of_a_configuration(place):
    json_file = place / "config.json"
    done = run(command(place, "drawn", *tiny(place), "--model=random_features", f"--json={json_file}"))
    assert done.returncode == 0, done.stderr
    report = json.loads(json_file.read_text())
    assert (report["num_samples"], report["num_reference"]) == (6, 24)
    assert report["reference"]["path"] == "data.name=functions split train" and len(report["config_sha256"]) == 64
    assert report["samples"]["manifest"] == MANIFEST
    assert report["precision"] == 1.0


def test_the_authors_protocol(place):
    """Unmollified samples are the data with fractions cut off; the reference is mirrored at random."""
    json_file = place / "authors.json"
    changes = {"diffusion.gaussian_filter_std": 0.0}
    extra = ["--protocol=reference", "--model=random_features", f"--json={json_file}"]
    done = run(command(place, "drawn", *tiny(place, **changes), *extra))
    assert done.returncode == 0, done.stderr
    report = json.loads(json_file.read_text())
    assert report["reference"]["path"].endswith("mirrored at random") and report["protocol"] == "reference"

    extractor = open_extractor("random_features", torch.device("cpu"))
    data = DatasetImages(micro.image(place), "train", 3)
    real = features(Mirrored(data, 0), extractor, Extraction())
    cut = []
    for i in range(6):
        x = torch.from_numpy(np.load(place / "drawn" / "raw" / f"{i:06d}.npy")).half().float()
        pixels = ((x + 1) / 2 * 255).clamp(0, 255).floor().permute(1, 2, 0).numpy().astype(np.uint8)
        cut.append(torch.from_numpy(extractor.prepare(pixels)).permute(2, 0, 1))
    made = extractor.network(torch.stack(cut))
    assert report["fid"] == pytest.approx(frechet_distance(gaussian_of(real), gaussian_of(made)), rel=1e-4)


def test_wrong_input_is_one_line(place):
    random, against = "--model=random_features", f"--reference={place / 'b'}"
    fails(command(place, "none", random, against), "--samples:")
    fails(command(place, "a", random), "exactly one of them")
    fails(command(place, "a", random, "--config.data.img_size=3"), "--config: missing")
    fails(command(place, "a", random, against, "--encoder_run_weights=best"), "--encoder_run_weights is best; accepted")
    broken = folder(place / "broken", 3)
    file = broken / "part1" / "0001.png"
    file.write_bytes(file.read_bytes()[:60])
    fails(command(place, "broken", random, against), "part1/0001.png cannot be decoded")
