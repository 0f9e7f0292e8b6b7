"""Data sets by name: published splits, their fallbacks, and the refusals."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.datasets import image_number, open_dataset, ratio_split
from data.functions import ProceduralFunctions
from data.pixels import to_uint8


def config(name, root_dir="", **changes):
    fields = {"name": name, "root_dir": str(root_dir), "img_size": 8, "img_width": 8, "channels": 3,
              "on_error": "raise", "val_ratio": 0.05, "num_workers": 0, "in_memory": "auto", "memory_gb": 1.0,
              "num_images": 40, "seed": 0}
    return SimpleNamespace(**fields | changes)


def write_images(folder, names):
    """Tiny images whose colour tells their place in `names`."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
    return folder


def names_of(cfg, split):
    dataset = open_dataset(cfg, split)
    return [dataset.item_name(i) for i in range(len(dataset))]


@pytest.mark.parametrize("count, ratio, held_out", [(100, 0.05, 5), (70000, 0.05, 3500), (7, 0.0, 0), (7, 0.2, 2),
                                                    (1, 0.5, 0), (2, 0.9, 1), (30, 0.1, 3)])
def test_ratio_split(count, ratio, held_out):
    parts = ratio_split(count, ratio)
    assert len(parts["val"]) == held_out and parts["train"] + parts["val"] == list(range(count))
    if held_out and count > 2:
        assert len(parts["train"]) == int(count * (1 - ratio) + 1e-9)  # the authors' first 95 %


def test_folder(tmp_path):
    names = [f"{i:02d}.png" for i in range(10)]
    root = write_images(tmp_path, names)
    assert names_of(config("folder", root, val_ratio=0.3), "train") == names[:7]
    assert names_of(config("folder", root, val_ratio=0.3), "val") == names[7:]
    assert names_of(config("folder", root, val_ratio=0.3), "all") == names
    assert names_of(config("folder", root, val_ratio=0.0), "train") == names
    with pytest.raises(ValueError, match=r"data\.val_ratio: 0\.0 leaves no validation images"):
        open_dataset(config("folder", root, val_ratio=0.0), "val")
    opened = [open_dataset(config("folder", root, val_ratio=0.3), split) for split in ("train", "val", "all")]
    assert len({dataset.fingerprint() for dataset in opened}) == 3


def test_ffhq(tmp_path, caplog):
    published = ["00000/img00059998.png", "00000/img00059999.png", "00000/img00060000.png", "00000/img00069999.png"]
    root = write_images(tmp_path / "full", published)
    assert names_of(config("ffhq", root), "train") == published[:2]
    assert names_of(config("ffhq", root), "val") == published[2:]
    part = [f"{i:05d}.png" for i in range(550, 590)]
    root = write_images(tmp_path / "part", part)
    with caplog.at_level(logging.INFO):
        assert names_of(config("ffhq", root), "train") == part[:38]  # 95 %
    assert "data.name=ffhq: numbers on both sides of 60000 not found" in caplog.text
    assert names_of(config("ffhq", root), "val") == part[38:]
    words = write_images(tmp_path / "words", ["a.png", "b.png", "c.png"])
    assert names_of(config("ffhq", words, val_ratio=0.4), "val") == ["b.png", "c.png"]


def test_celeba_by_number_and_fallback(tmp_path):
    root = write_images(tmp_path / "a", ["9.png", "10.png", "26999.png", "27000.png", "29999.png"])
    assert names_of(config("celeba", root), "val") == ["27000.png", "29999.png"]
    assert names_of(config("celeba", root), "train") == ["10.png", "26999.png", "9.png"]  # sorted as text
    root = write_images(tmp_path / "b", [f"{i}.png" for i in range(5)])
    assert names_of(config("celeba", root), "val") == ["4.png"]


@pytest.mark.parametrize("layout", ["beside", "sized", "inside"])
def test_celeba_with_the_authors_list(tmp_path, layout):
    names = [f"{i:05d}.png" for i in range(6)]
    images = write_images(tmp_path / "root" / {"beside": "images", "sized": "8", "inside": "."}[layout], names)
    if layout == "sized":
        write_images(tmp_path / "root" / "16", ["00000.png"])  # another size is left alone
    table = {"train": ["00004.png", "00001", "00000.png"], "val": ["00002.png"]}
    (tmp_path / "root" / "split.json").write_text(json.dumps(table))
    cfg = config("celeba", images if layout == "beside" else tmp_path / "root")
    assert names_of(cfg, "train") == ["00004.png", "00001.png", "00000.png"]
    assert names_of(cfg, "val") == ["00002.png"]
    faults = (({"train": []}, "must hold"), ({"train": ["x.png"], "val": []}, r"lists x\.png"), ([1], "must hold"))
    for bad, message in faults:
        (tmp_path / "root" / "split.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            open_dataset(cfg, "train")


def write_lmdb(path, keys):
    lmdb = pytest.importorskip("lmdb")
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for i, key in enumerate(keys):
            file = path / "image.webp"
            Image.new("RGB", (12, 9), (0, i, 0)).save(file, lossless=True)
            transaction.put(key.encode(), file.read_bytes())
            file.unlink()
    return path


def test_churches(tmp_path, caplog):
    write_lmdb(tmp_path / "lsun" / "church_outdoor_train_lmdb", ["b", "a", "c"])
    with pytest.raises(ValueError, match=r"no LMDB in .*church_outdoor_val_lmdb, which holds the split 'val'"):
        open_dataset(config("churches", tmp_path / "lsun"), "val")
    write_lmdb(tmp_path / "lsun" / "church_outdoor_val_lmdb", ["z"])
    assert names_of(config("churches", tmp_path / "lsun"), "train") == ["a", "b", "c"]
    assert names_of(config("churches", tmp_path / "lsun"), "val") == ["z"]
    train = open_dataset(config("churches", tmp_path / "lsun"), "train")
    assert (train[0] == torch.tensor([0, 1, 0])[:, None, None]).all()  # "a" was written second
    single = tmp_path / "lsun" / "church_outdoor_train_lmdb"
    assert names_of(config("churches", single, val_ratio=0.3), "val") == ["c"]
    folder = write_images(tmp_path / "files", [f"{i}.png" for i in range(4)])
    with caplog.at_level(logging.INFO):
        assert names_of(config("churches", folder, val_ratio=0.25), "val") == ["3.png"]
    assert "church_outdoor_train_lmdb and church_outdoor_val_lmdb not found" in caplog.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*looked for church_outdoor_train_lmdb/, .*data\.mdb"):
        open_dataset(config("churches", tmp_path / "empty"), "train")


def test_functions():
    cfg = config("functions", img_width=12, seed=4, val_ratio=0.1)
    train, val = open_dataset(cfg, "train"), open_dataset(cfg, "val")
    assert len(train) == 40 and len(val) == 4 and train.size == (8, 12)
    assert torch.equal(train[39], to_uint8(ProceduralFunctions(4).evaluate(39, (8, 12))))
    assert not any(torch.equal(v, t) for v in val.pixels for t in train.pixels)
    assert train.fingerprint() != val.fingerprint()
    more = open_dataset(config("functions", img_width=12, seed=4, val_ratio=0.1, num_images=80), "val")
    assert torch.equal(more.pixels[:4], val.pixels)  # validation functions stay when training grows
    assert open_dataset(config("functions", img_width=0), "train").size == (8, 8)


@pytest.mark.parametrize("changes, split, message", [
    ({"name": "mnist"}, "train", r"data\.name: 'mnist', accepted are functions, folder, ffhq, celeba, churches"),
    ({}, "test", "split: 'test', accepted are train, val"),
    ({}, "all", "split: 'all' is not defined"),
    ({"channels": 2}, "train", r"data\.channels: 2, accepted are 1"),
    ({"img_size": 0}, "train", r"data\.img_size, data\.img_width: \(0, 8\)"),
    ({"val_ratio": 1.0}, "train", r"data\.val_ratio: 1\.0, accepted are numbers in"),
    ({"val_ratio": 0.0}, "val", r"data\.val_ratio: 0\.0 leaves no validation images"),
    ({"num_images": 0}, "train", r"data\.num_images: 0"),
    ({"name": "folder"}, "train", r"data\.root_dir: empty"),
    ({"name": "celeba", "root_dir": "/nowhere/at/all"}, "train", "does not exist"),
])
def test_refusals(changes, split, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(config(**{"name": "functions", **changes}), split)
    assert "\n" not in str(caught.value)


def test_image_number():
    assert image_number("thumbs128x128/img00000017.png") == 17
    assert image_number("00550.jpg") == 550
    assert image_number("face.jpg") is None
