"""Folders of samples: what counts as drawn, what is drawn again, and who may be in a folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import micro
from diffusion.mollifier import IDENTITY
from infty_diff.folder import FolderOptions, draw_folder
from infty_diff.latent_prior import LatentPrior
from infty_diff.model import InftyDiff, SamplingOptions
from metrics.evaluation import evaluate
from metrics.extractors import open_extractor
from metrics.features import Extraction
from metrics.images import MollifiedSamples
from models.factory import build_latent_model
from pictures import folder, images_of, zipped
from runtime.claimed import open_png, save_png, whole_png
from runtime.lock import FolderLock, trial

OPTIONS = FolderOptions((16, 12), SamplingOptions("2"), latent_steps="2", save_raw=True)
MODEL = {"weights": "a"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InftyDiff:
    root = tmp_path_factory.mktemp("model")
    image, latent = micro.image(root), micro.latent(root)
    prior = LatentPrior(latent, build_latent_model(latent.model, 6), torch.zeros(6), torch.ones(6))
    return InftyDiff(image, *micro.networks(image).values(), prior)


@pytest.fixture
def drawn(model, tmp_path) -> Path:
    assert draw_folder(model, tmp_path / "out", [0, 1], OPTIONS, MODEL) == 2
    return tmp_path / "out"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def foreign(path: Path) -> None:
    Image.new("RGB", (12, 16), "red").save(path)


def other_seed(path: Path) -> None:
    path.write_bytes((path.parent / "000000.png").read_bytes())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [foreign, other_seed, cut, one_bit])
def test_what_is_no_sample_is_drawn_again(model, drawn, damage):
    before = files(drawn)
    damage(drawn / "000001.png")
    assert files(drawn) != before
    assert draw_folder(model, drawn, [0, 1], OPTIONS, MODEL) == 1
    assert files(drawn) == before


@pytest.mark.parametrize("damage", [cut, one_bit, lambda path: path.write_bytes(b"")])
def test_a_damaged_raw_file_is_drawn_again(model, drawn, damage):
    raw, before = drawn / "raw" / "000001.npy", files(drawn)
    damage(raw)
    assert draw_folder(model, drawn, [0, 1], OPTIONS, MODEL) == 1
    assert files(drawn) == before
    for other in (np.zeros((3, 2, 2), np.float32), np.load(raw) + 1):
        np.save(raw, other)
        assert draw_folder(model, drawn, [0, 1], OPTIONS, MODEL) == 1
        assert files(drawn) == before


def test_damaged_samples_are_no_scores(drawn, tmp_path):
    """Whatever is damaged is named, before features of the reference are kept; archives are as the folder."""
    Image.new("RGB", (12, 16), "red").save(drawn / "000009.png")
    shutil.make_archive(str(tmp_path / "tarred"), "tar", tmp_path, "out")
    zipped(drawn, tmp_path / "zipped.zip")
    manifest = json.loads((drawn / "manifest.json").read_text())
    for path in (drawn, tmp_path / "tarred.tar", tmp_path / "zipped.zip"):
        samples = images_of(path)
        assert len(samples) == 2 and samples.manifest == manifest
    how = Extraction(cache_dir=tmp_path / "cache")
    reference, extractor = (
        images_of(folder(tmp_path / "real", 4)),
        open_extractor("random_features", torch.device("cpu")),
    )
    picture, raw = drawn / "000001.png", drawn / "raw" / "000001.npy"
    for damage in (cut, one_bit, lambda path: path.write_bytes(b"null")):
        whole = picture.read_bytes()
        damage(picture)
        zipped(drawn, tmp_path / "zipped.zip")
        for path in (drawn, tmp_path / "zipped.zip"):
            with pytest.raises(ValueError, match=rf"--samples: {path}: 000001\.png .*; accepted: whole samples"):
                evaluate(images_of(path), reference, extractor, how)
        picture.write_bytes(whole)
    one_bit(raw)
    with pytest.raises(ValueError, match=r"raw/000001\.npy is damaged: its checksum is another; accepted: whole"):
        evaluate(MollifiedSamples(str(drawn), IDENTITY, 0.05, 3, None), reference, extractor, how)
    assert not (tmp_path / "cache").exists()


def test_a_deleted_manifest_is_rewritten_as_it_was_or_not_at_all(model, drawn):
    before = files(drawn)
    (drawn / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds 000000\.png, which is not of these settings"):
        draw_folder(model, drawn, [0, 1], OPTIONS, {"weights": "b"})
    assert files(drawn).keys() == before.keys() - {"manifest.json"}
    assert draw_folder(model, drawn, [0, 1], OPTIONS, MODEL) == 0
    assert files(drawn) == before


def test_pictures_of_others_are_left_alone(model, tmp_path):
    foreign(tmp_path / "000000.png")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"holds 000000\.png"):
        draw_folder(model, tmp_path, [0, 1], OPTIONS, MODEL)
    assert files(tmp_path) == before


def test_samples_beyond_the_limit_for_strangers_can_be_resumed(model, tmp_path, monkeypatch):
    options = FolderOptions((64, 48), SamplingOptions("2"), latent_steps="2")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # refuses twice as many; captions need 500
    assert draw_folder(model, tmp_path, [0], options, MODEL) == 1
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "000000.png")
    assert draw_folder(model, tmp_path, [0, 1], options, MODEL) == 1
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_second_command_is_kept_out(model, drawn):
    before = files(drawn)
    with FolderLock(drawn), pytest.raises(ValueError, match=f"out: in use by process {os.getpid()} on "):
        draw_folder(model, drawn, [0, 1, 2], OPTIONS, MODEL)
    for place in (drawn, drawn.with_name("new")):
        with trial(), pytest.raises(SystemExit) as end:
            draw_folder(model, place, [0, 1, 2], OPTIONS, MODEL)
        assert end.value.code == 0
    with FolderLock(drawn), trial(), pytest.raises(ValueError, match="in use by process"):
        draw_folder(model, drawn, [0], OPTIONS, MODEL)
    with trial(), pytest.raises(ValueError, match="holds results of other model"):
        draw_folder(model, drawn, [0], OPTIONS, {"weights": "b"})
    assert files(drawn) == before and not drawn.with_name("new").exists()
    assert draw_folder(model, drawn, [0, 1, 2], OPTIONS, MODEL) == 1


def test_a_picture_keeps_its_texts_and_its_size(tmp_path):
    save_png(tmp_path / "a.png", torch.zeros(3, 5, 7, dtype=torch.uint8), "mark", {"result": "ξ"})
    assert whole_png(tmp_path / "a.png") == ((5, 7), {"folder": "mark", "result": "ξ"})
    Image.new("RGB", (3, 3)).save(tmp_path / "b.png", format="GIF")  # no PNG, whatever its name
    assert whole_png(tmp_path / "b.png") is None
    with open_png(tmp_path / "a.png") as image:
        assert image.size == (7, 5)
