"""Data sets by name, with their splits.

| data.name | root_dir | training | validation |
|---|---|---|---|
| functions | unused | functions 0 ... num_images-1 of data.seed | val_ratio·num_images others |
| folder | images | all others | about val_ratio of the images, by a hash of their names |
| ffhq | images | image number < 60000 | image number >= 60000 |
| fashion_mnist | .npz, or folder of the idx file | all others of its training images | as for folder |
| celeba | images; split.json beside them is used if present | number < 27000 | number >= 27000 |
| fields | .npy, .npz or NetCDF file, or a folder of them | all others | as for folder, by names of fields |
| churches | LSUN's LMDB folders, or one LMDB, or images | church_outdoor_train | church_outdoor_val |

Images are a folder, a zip, a tar, or several tars: those in a folder without images, or of a pattern.

This is data.split=published. Where a published split cannot be made (numbers of one side only, say a subset of FFHQ,
or a church folder without LSUN's two databases), the rule of `folder` holds and a line in the log says so. The number
of an image is the last number in its file name; names without numbers count by position in sorted order.
data.split=authors, for ffhq alone, is that of the authors' code: the first 1 - val_ratio of the sorted names are for
training.

By the rule of `folder` an image stays on its side when others are added, or left out by on_error=skip. As long as two
images are good and val_ratio is above 0, there is one on either side.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data.base import ImageDataset, Keep, check_lattice, own_memory
from data.decoding import can_be_used
from data.fashion_mnist import ACCEPTED, FashionImages, index_name, read_fashion_mnist
from data.fields import open_fields
from data.functions import FunctionImages
from data.images import ImageFiles
from data.lsun import LsunSource, is_lmdb
from data.opening import read_json
from data.sources import ImageSource, existing_path, open_source
from data.splits import Split, hashed_split, number_split, tail_split

SPLITS = ("train", "val", "all")
SPLIT_RULES = ("published", "authors")
FFHQ_TRAINING = 60000  # of 70000 images
CELEBA_TRAINING = 27000  # of 30000 images
VALIDATION_FUNCTIONS = 1 << 32  # index of the first validation function, beyond every num_images
CHURCH_FOLDERS = {"train": "church_outdoor_train_lmdb", "val": "church_outdoor_val_lmdb"}
_log = logging.getLogger(__name__)


def open_dataset(data_cfg: Any, split: str, keep: Keep = own_memory) -> ImageDataset:
    """The data set that a configuration names.

    Args:
        data_cfg: has the attributes name, root_dir, img_size (H), img_width (W; 0 or None = img_size), channels,
            on_error, split, val_ratio, in_memory, memory_gb, num_images and seed, as in the data section.
        split: "train", "val", or "all" = both, training first.
        keep: where decoded images are kept, and by whom filled.

    Raises:
        ValueError: one line naming the field, its value and what is accepted or was looked for.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")
    if data_cfg.name not in DATASETS:
        raise ValueError(f"data.name is {data_cfg.name!r}; accepted: {', '.join(DATASETS)}")
    if not 0 <= data_cfg.val_ratio < 1:
        raise ValueError(f"data.val_ratio is {data_cfg.val_ratio}; accepted: numbers in [0, 1)")
    if data_cfg.split != "published" and (data_cfg.split != "authors" or data_cfg.name != "ffhq"):
        raise ValueError(f"data.split is {data_cfg.split!r}; accepted: published, and with data.name=ffhq authors")
    if data_cfg.name != "fields":  # of which any number of channels is accepted
        check_lattice(_size(data_cfg), data_cfg.channels)
    return DATASETS[data_cfg.name](data_cfg, split, keep)


def _functions(cfg: Any, split: str, keep: Keep) -> ImageDataset:
    held_out = math.ceil(cfg.val_ratio * cfg.num_images - 1e-9)
    if split == "all":
        raise ValueError("split is 'all', which is not defined for data.name=functions; accepted: train, val")
    count, first = (cfg.num_images, 0) if split == "train" else (held_out, VALIDATION_FUNCTIONS)
    if split == "val" and not held_out:
        raise ValueError(_no_validation(cfg))
    return FunctionImages(
        cfg.seed,
        count,
        _size(cfg),
        cfg.channels,
        first=first,
        split=split,
        in_memory=cfg.in_memory,
        memory_gb=cfg.memory_gb,
        keep=keep,
    )


def _folder(cfg: Any, split: str, keep: Keep) -> ImageDataset:
    source = open_source(cfg.root_dir)
    return _files(cfg, source, hashed_split(source.names, cfg.val_ratio, good=_good(cfg, source)), split, keep)


def _ffhq(cfg: Any, split: str, keep: Keep) -> ImageDataset:
    source = open_source(cfg.root_dir)
    if cfg.split == "authors":
        return _files(cfg, source, tail_split(len(source.names), cfg.val_ratio, _good(cfg, source)), split, keep)
    wanted = f"numbers on both sides of {FFHQ_TRAINING}"
    parts = number_split(source.names, FFHQ_TRAINING) or _fallback(cfg, source, wanted)
    return _files(cfg, source, parts, split, keep)


def _fashion_mnist(cfg: Any, split: str, keep: Keep) -> ImageDataset:
    images = read_fashion_mnist(existing_path(cfg.root_dir, accepted=ACCEPTED))
    parts = hashed_split([index_name(i) for i in range(len(images))], cfg.val_ratio)
    return FashionImages(images, _chosen(cfg, parts, split), _size(cfg), cfg.channels, split=split, keep=keep)


def _fields(cfg: Any, split: str, keep: Keep) -> ImageDataset:
    def parts(names: list[str]) -> Split:
        found = hashed_split(names, cfg.val_ratio)
        _chosen(cfg, found, split)  # without validation fields, that is said first
        return found

    return open_fields(cfg, split, _size(cfg), parts)


def _celeba(cfg: Any, split: str, keep: Keep) -> ImageDataset:
    root = existing_path(cfg.root_dir)
    sized = root / str(cfg.img_size)  # one folder per size beside split.json is the authors' layout
    source = open_source(sized if sized.is_dir() else root)
    table = next((p for p in (root / "split.json", root.parent / "split.json") if p.is_file()), None)
    parts = _listed_split(table, source) if table else number_split(source.names, CELEBA_TRAINING)
    wanted = f"split.json or numbers on both sides of {CELEBA_TRAINING}"
    return _files(cfg, source, parts or _fallback(cfg, source, wanted), split, keep)


def _churches(cfg: Any, split: str, keep: Keep) -> ImageDataset:
    root = existing_path(cfg.root_dir)
    folders = {part: root / folder for part, folder in CHURCH_FOLDERS.items()}
    if any(is_lmdb(folder) for folder in folders.values()):
        if split == "all":
            raise ValueError(
                "split is 'all', which is not defined for the two databases of data.name=churches; accepted: train, val"
            )
        if not is_lmdb(folders[split]):
            raise ValueError(f"data.root_dir: no LMDB in {folders[split]}, which holds the split {split!r}")
        part = LsunSource(folders[split])
        return _files(cfg, part, {split: list(range(len(part.names)))}, split, keep)
    source: ImageSource
    if is_lmdb(root):
        source = LsunSource(root)
    else:
        try:
            source = open_source(root)
        except ValueError as error:
            looked_for = ", ".join(f"{folder}/" for folder in CHURCH_FOLDERS.values())
            raise ValueError(f"{error}; nor is there an LMDB in it: looked for {looked_for}, data.mdb") from error
    return _files(cfg, source, _fallback(cfg, source, " and ".join(CHURCH_FOLDERS.values())), split, keep)


DATASETS: dict[str, Callable[[Any, str, Keep], ImageDataset]] = {
    "functions": _functions,
    "folder": _folder,
    "ffhq": _ffhq,
    "fashion_mnist": _fashion_mnist,
    "celeba": _celeba,
    "churches": _churches,
    "fields": _fields,
}


def _files(cfg: Any, source: ImageSource, parts: Split, split: str, keep: Keep) -> ImageFiles:
    return ImageFiles(
        cfg.name,
        source,
        _chosen(cfg, parts, split),
        _size(cfg),
        cfg.channels,
        split=split,
        on_error=cfg.on_error,
        in_memory=cfg.in_memory,
        memory_gb=cfg.memory_gb,
        keep=keep,
    )


def _chosen(cfg: Any, parts: Split, split: str) -> list[int]:
    indices = parts["train"] + parts["val"] if split == "all" else parts[split]
    if split == "val" and not indices:
        raise ValueError(_no_validation(cfg))
    return indices


def _good(cfg: Any, source: ImageSource) -> Callable[[int], bool]:
    """Which images count: those left out must not be all that a split has, and where one is an error all do."""
    if cfg.on_error != "skip":
        return lambda i: True
    return partial(can_be_used, source, size=_size(cfg), channels=cfg.channels)


def _fallback(cfg: Any, source: ImageSource, wanted: str) -> Split:
    """The split of `folder`, for sources without what the published split needs."""
    parts = hashed_split(source.names, cfg.val_ratio, good=_good(cfg, source))
    _log.info(
        "data.name=%s: %s not found in %s; %d of the %d images, chosen by a hash of their names, are for validation",
        cfg.name,
        wanted,
        source.path,
        len(parts["val"]),
        len(source.names),
    )
    return parts


def _listed_split(table: Path, source: ImageSource) -> Split:
    """The split of a JSON file {"train": [names], "val": [names]}; names are paths, file names or stems."""
    accepted = '{"train": [names], "val": [names]}'
    try:
        listed = read_json(table, dict, accepted)
    except ValueError as error:
        raise ValueError(f"data.root_dir: {error}") from None
    for part in ("train", "val"):
        names = listed.get(part)
        if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise ValueError(f"data.root_dir: {table}: holds no list of names {part!r}; accepted: {accepted}")
    wanted = {part: [str(name) for name in listed[part]] for part in ("train", "val")}
    position: dict[str, int] = {}
    for i, name in enumerate(source.names):
        path = PurePosixPath(name)
        for key in (path.stem, path.name, name):
            position[key] = i
    missing = [name for names in wanted.values() for name in names if name not in position]
    if missing:
        raise ValueError(
            f"data.root_dir: {table} lists {missing[0]} (and {len(missing) - 1} more) not found in {source.path}"
        )
    return {part: [position[name] for name in names] for part, names in wanted.items()}


def _no_validation(cfg: Any) -> str:
    return (
        f"data.val_ratio is {cfg.val_ratio}, which leaves no validation images; accepted: a number above 0, with "
        "at least two images"
    )


def _size(cfg: Any) -> tuple[int, int]:
    return cfg.img_size, cfg.img_width or cfg.img_size
