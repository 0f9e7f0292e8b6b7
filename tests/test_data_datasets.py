"""Data sets by name: published splits, their fallbacks, and the refusals."""

import hashlib
import json
import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import open_dataset
from data.functions import ProceduralFunctions
from data.pixels import to_uint8
from data.splits import hashed_split, image_number, place, tail_split


def config(name, root_dir="", **changes):
    fields = {
        "name": name,
        "root_dir": str(root_dir),
        "img_size": 8,
        "img_width": 8,
        "channels": 3,
        "on_error": "raise",
        "split": "published",
        "val_ratio": 0.05,
        "num_workers": 0,
        "in_memory": "auto",
        "memory_gb": 1.0,
        "num_images": 40,
        "seed": 0,
    }
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


def test_places_are_a_hash():
    digest = hashlib.blake2b("köln/1.jpg".encode(), digest_size=8, person=b"validation").digest()
    assert place("köln/1.jpg", "validation") == int.from_bytes(digest, "big") // 2**11 / 2**53
    assert place("a\udcff.jpg", "latents") != place("a\udcff.jpg", "validation")  # a name that is not UTF-8


def test_hashed_split_takes_about_its_part_of_every_class():
    names = [f"{kind}/{i}.jpg" for kind in ("dress", "hat", "shoes") for i in range(2000)]
    split = hashed_split(names, 0.1)
    assert sorted(split["train"] + split["val"]) == list(range(6000))
    for part in split.values():
        assert part == sorted(part)
    for first in (0, 2000, 4000):
        held_out = sum(first <= i < first + 2000 for i in split["val"])
        assert abs(held_out - 200) < 5 * 180**0.5  # binomial
    other = hashed_split(names, 0.1, "latents")["val"]
    assert abs(len(set(other) & set(split["val"])) - 60) < 5 * 60**0.5  # independent


def test_an_image_keeps_its_side_when_others_come_or_go():
    names = [f"{i}.jpg" for i in range(400)]
    held_out = {names[i] for i in hashed_split(names, 0.2)["val"]}
    some = names[::-3]
    assert {some[i] for i in hashed_split(some, 0.2)["val"]} == held_out & set(some)


def by_hash(names, ratio):
    """The image held out of a few, if no more than one is."""
    places = sorted((place(name, "validation"), name) for name in names)
    assert places[1][0] >= ratio
    return places[0][1]


@pytest.mark.parametrize("count", range(7))
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 0.9])
def test_small_sets_have_both_sides(count, ratio):
    for split in (hashed_split([f"{i}.png" for i in range(count)], ratio), tail_split(count, ratio)):
        assert sorted(split["train"] + split["val"]) == list(range(count))
        if ratio == 0 or count < 2:
            assert not split["val"]
        else:
            assert split["train"] and split["val"]


@pytest.mark.parametrize("bad", [{0, 1, 2}, {3, 4, 5}, {0, 5}, {1, 2, 3, 4}, {0, 1, 2, 3, 4}, set(range(6))])
def test_both_sides_have_a_good_image(bad):
    names, good = [f"{i}.png" for i in range(6)], lambda i: i not in bad
    for ratio in (0.01, 0.3, 0.9):
        for split in (hashed_split(names, ratio, good=good), tail_split(6, ratio, good)):
            if len(bad) < 5:
                assert any(map(good, split["train"])) and any(map(good, split["val"]))
            else:
                assert not split["val"]


@pytest.mark.parametrize("count", [2, 7, 20, 100, 1001, 70000])
def test_the_tail_is_the_authors_split(count):
    first = int(count * 0.95)
    assert tail_split(count, 0.05) == {"train": list(range(first)), "val": list(range(first, count))}


def test_folder(tmp_path):
    names = [f"{i:02d}.png" for i in range(10)]
    root = write_images(tmp_path, names)
    expected = {name for name in names if place(name, "validation") < 0.3}
    assert 0 < len(expected) < 10
    assert names_of(config("folder", root, val_ratio=0.3), "train") == sorted(set(names) - expected)
    assert names_of(config("folder", root, val_ratio=0.3), "val") == sorted(expected)
    both = names_of(config("folder", root, val_ratio=0.3), "all")
    assert both == sorted(set(names) - expected) + sorted(expected)
    assert names_of(config("folder", root, val_ratio=0.0), "train") == names
    with pytest.raises(ValueError, match=r"data\.val_ratio is 0\.0, which leaves no validation images"):
        open_dataset(config("folder", root, val_ratio=0.0), "val")
    opened = [open_dataset(config("folder", root, val_ratio=0.3), split) for split in ("train", "val", "all")]
    assert len({dataset.fingerprint() for dataset in opened}) == 3


@pytest.mark.parametrize("fault", ["header", "pixels", "small"])
@pytest.mark.parametrize("in_memory", ["always", "never"])
def test_bad_images_leave_both_sides_wherever_they_lie(tmp_path, fault, in_memory):
    """Two good images are enough, whichever they are."""
    names = [f"{i}.png" for i in range(6)]
    noise = np.random.default_rng(0)
    for kept in ((0, 1), (4, 5), (2, 3), (0, 5)):
        root = tmp_path / f"{fault}{kept}"
        root.mkdir()
        for i, name in enumerate(names):
            side = 4 if fault == "small" and i not in kept else 40
            Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(root / name)
            if i not in kept and fault != "small":
                content = (root / name).read_bytes()
                (root / name).write_bytes(content[: len(content) // 2] if fault == "pixels" else b"text")
        cfg = config("folder", root, on_error="skip", in_memory=in_memory)
        good = [Image.open(root / names[i]).resize((8, 8), Image.Resampling.LANCZOS) for i in kept]
        good = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in good]
        seen = set()
        for split in ("train", "val"):
            dataset = open_dataset(cfg, split)
            for i in range(len(dataset)):
                seen |= {(split, j) for j, image in enumerate(good) if torch.equal(dataset[i], image)}
                assert any(torch.equal(dataset[i], image) for image in good)
        assert seen in ({("train", 0), ("val", 1)}, {("train", 1), ("val", 0)})


def test_ffhq(tmp_path, caplog):
    published = ["00000/img00059998.png", "00000/img00059999.png", "00000/img00060000.png", "00000/img00069999.png"]
    root = write_images(tmp_path / "full", published)
    assert names_of(config("ffhq", root), "train") == published[:2]
    assert names_of(config("ffhq", root), "val") == published[2:]
    authors = config("ffhq", root, split="authors", val_ratio=0.25)
    assert names_of(authors, "train") == published[:3] and names_of(authors, "val") == published[3:]
    part = [f"{i:05d}.png" for i in range(550, 590)]
    root = write_images(tmp_path / "part", part)
    held_out = [name for name in part if place(name, "validation") < 0.05]
    with caplog.at_level(logging.INFO):
        assert names_of(config("ffhq", root), "val") == held_out
    assert "data.name=ffhq: numbers on both sides of 60000 not found" in caplog.text
    assert f"{len(held_out)} of the 40 images, chosen by a hash of their names" in caplog.text
    assert names_of(config("ffhq", root), "train") == [name for name in part if name not in held_out]
    assert names_of(config("ffhq", root, split="authors"), "train") == part[:38]  # 95 %
    assert names_of(config("ffhq", root, split="authors"), "val") == part[38:]
    words = write_images(tmp_path / "words", ["a.png", "b.png", "c.png"])
    assert len(names_of(config("ffhq", words, val_ratio=0.4), "val")) in (1, 2)


def test_celeba_by_number_and_fallback(tmp_path):
    root = write_images(tmp_path / "a", ["9.png", "10.png", "26999.png", "27000.png", "29999.png"])
    assert names_of(config("celeba", root), "val") == ["27000.png", "29999.png"]
    assert names_of(config("celeba", root), "train") == ["10.png", "26999.png", "9.png"]  # sorted as text
    root = write_images(tmp_path / "b", [f"{i}.png" for i in range(5)])
    assert len(names_of(config("celeba", root), "val")) == 1


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
    faults = (
        ({"train": []}, "accepted: {.train.: .names"),
        ({"train": ["x.png"], "val": []}, r"lists x\.png"),
        ([1], "holds an array; accepted"),
    )
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
    assert names_of(config("churches", single, val_ratio=0.3), "val") == [by_hash("abc", 0.3)]
    folder = write_images(tmp_path / "files", [f"{i}.png" for i in range(4)])
    with caplog.at_level(logging.INFO):
        assert names_of(config("churches", folder, val_ratio=0.25), "val") == [by_hash(os.listdir(folder), 0.25)]
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


@pytest.mark.parametrize(
    "changes, split, message",
    [
        (
            {"name": "mnist"},
            "train",
            r"data\.name is 'mnist'; accepted: functions, folder, ffhq, fashion_mnist, celeba, churches",
        ),
        ({}, "test", "split is 'test'; accepted: train, val"),
        ({}, "all", "split is 'all', which is not defined"),
        ({"channels": 2}, "train", r"data\.channels is 2; accepted: 1"),
        ({"img_size": 0}, "train", r"data\.img_size, data\.img_width are \(0, 8\)"),
        ({"val_ratio": 1.0}, "train", r"data\.val_ratio is 1\.0; accepted: numbers in"),
        ({"val_ratio": 0.0}, "val", r"data\.val_ratio is 0\.0, which leaves no validation images"),
        ({"split": "authors"}, "train", r"data\.split is 'authors'; accepted: published, and with data\.name=ffhq"),
        ({"split": "first", "name": "ffhq"}, "train", r"data\.split is 'first'; accepted: published"),
        ({"num_images": 0}, "train", r"data\.num_images is 0"),
        ({"name": "folder"}, "train", r"data\.root_dir: empty"),
        ({"name": "celeba", "root_dir": "/nowhere/at/all"}, "train", "does not exist"),
    ],
)
def test_refusals(changes, split, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(config(**{"name": "functions", **changes}), split)
    assert "\n" not in str(caught.value)


def test_image_number():
    assert image_number("thumbs128x128/img00000017.png") == 17
    assert image_number("00550.jpg") == 550
    assert image_number("face.jpg") is None
