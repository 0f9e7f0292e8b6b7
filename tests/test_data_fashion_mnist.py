"""Fashion-MNIST from made arrays: both kinds of files, border, other sizes and channels, the split, the refusals."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST

from data.datasets import open_dataset
from data.splits import place
from tests.test_data_datasets import config

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
LABELS = np.zeros(len(IMAGES), dtype=np.uint8)


def write_npz(folder, **arrays):
    np.savez(folder / "clothes.npz", **arrays)
    return folder / "clothes.npz"


def write_idx(folder):
    """The four files of the published set, which torchvision wants all."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, *IMAGES.shape) + bytes(IMAGES))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(LABELS)) + bytes(LABELS))
    return folder


def opened(root, split="all", **changes):
    fields = {"img_size": 32, "img_width": 32, "channels": 1, "val_ratio": 0.2, **changes}
    return open_dataset(config("fashion_mnist", root, **fields), split)


def test_both_kinds_of_files_hold_the_same(tmp_path):
    npz, idx = write_npz(tmp_path, images=IMAGES, labels=LABELS), write_idx(tmp_path / "idx")
    assert torch.equal(FashionMNIST(str(idx)).data, torch.from_numpy(IMAGES))
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "train-images-idx3-ubyte.gz").write_bytes(
        gzip.compress((idx / "FashionMNIST/raw/train-images-idx3-ubyte").read_bytes())
    )
    for split in ("train", "val", "all"):
        sets = [opened(root, split) for root in (npz, idx, packed)]
        assert len({dataset.fingerprint() for dataset in sets}) == 1
        assert torch.equal(sets[0].pixels, sets[1].pixels)


def test_images_lie_in_a_black_border(tmp_path):
    dataset = opened(write_npz(tmp_path, images=IMAGES))
    assert dataset.pixels.shape == (40, 1, 32, 32) and dataset.pixels.dtype == torch.uint8
    for i in range(40):
        item, image = dataset[i][0], IMAGES[int(dataset.item_name(i))]
        assert np.array_equal(item[2:30, 2:30], image)
        assert item.sum() == image.sum(dtype=np.int64)  # nothing else
    with pytest.raises(IndexError):
        dataset[40]


def test_the_split_is_by_the_hash_of_the_numbers(tmp_path):
    npz = write_npz(tmp_path, images=IMAGES)
    names = [f"{i:05d}" for i in range(40)]
    expected = [name for name in names if place(name, "validation") < 0.2]
    assert 0 < len(expected) < 20

    def there(split):
        dataset = opened(npz, split)
        return [dataset.item_name(i) for i in range(len(dataset))]

    assert there("val") == expected
    assert there("train") == [name for name in names if name not in expected]
    assert there("all") == there("train") + expected
    with pytest.raises(ValueError, match=r"data\.val_ratio is 0\.0, which leaves no validation images"):
        opened(npz, "val", val_ratio=0.0)
    assert len({opened(npz, split).fingerprint() for split in ("train", "val", "all")}) == 3


@pytest.mark.parametrize("size", [(16, 16), (32, 24), (9, 15)])
def test_smaller_sizes_are_cropped_and_reduced_with_the_border(tmp_path, size):
    dataset = opened(write_npz(tmp_path, images=IMAGES), img_size=size[0], img_width=size[1])
    padded = np.zeros((32, 32), dtype=np.uint8)
    padded[2:30, 2:30] = IMAGES[int(dataset.item_name(0))]
    height, width = {(16, 16): (32, 32), (32, 24): (32, 24), (9, 15): (19, 32)}[size]
    top, left = (32 - height) // 2, (32 - width) // 2
    part = Image.fromarray(padded[top : top + height, left : left + width])
    assert np.array_equal(dataset[0][0], np.array(part.resize(size[::-1], Image.Resampling.LANCZOS)))


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_repeats_the_grey(tmp_path, channels):
    npz = write_npz(tmp_path, images=IMAGES)
    coloured, grey = opened(npz, channels=channels), opened(npz)
    assert coloured.pixels.shape == (40, channels, 32, 32)
    assert torch.equal(coloured.pixels[:, :3], grey.pixels.expand(-1, 3, -1, -1))
    assert (coloured.pixels[:, 3:] == 255).all()


@pytest.mark.parametrize(("arrays", "message"), [
    ({"pictures": IMAGES}, "has no array images"),
    ({"images": IMAGES[:0]}, r"holds images of uint8 \(0, 28, 28\); accepted: uint8 \(N, 28, 28\) with N >= 1"),
    ({"images": IMAGES / 255}, r"holds images of float64 \(40, 28, 28\)"),
    ({"images": IMAGES[:, :27]}, r"holds images of uint8 \(40, 27, 28\)"),
    ({"images": IMAGES[..., None]}, r"holds images of uint8 \(40, 28, 28, 1\)"),
    ({"images": np.array([None])}, "cannot be read"),
])  # fmt: skip
def test_wrong_arrays_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=r"data\.root_dir: .*" + message) as error:
        opened(write_npz(tmp_path, **arrays))
    assert "\n" not in str(error.value)


def test_wrong_files_are_refused(tmp_path):
    whole = struct.pack(">4B3I", 0, 0, 8, 3, *IMAGES.shape) + bytes(IMAGES)
    np.save(tmp_path / "plain.npy", IMAGES)
    for name, content in {"empty.npz": b"", "text.npz": b"no archive", "cut.npz": whole[:100]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"data\.root_dir: .* cannot be read .*; accepted: an \.npz"):
            opened(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read"):
        opened(tmp_path / "plain.npy")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no train-images-idx3-ubyte"):
        opened(folder)
    for content in (b"", whole[:20], whole[:-1], b"\0\0\x0d" + whole[3:]):
        (folder / "train-images-idx3-ubyte").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged; accepted: an idx file of uint8 images"):
            opened(folder)
    with pytest.raises(ValueError, match=r"does not exist; accepted: an \.npz"):
        opened(tmp_path / "nothing")


def test_larger_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\(33, 32\), accepted with data\.name=fashion_mnist are sizes up to 32x32"):
        opened(write_npz(tmp_path, images=IMAGES), img_size=33)
