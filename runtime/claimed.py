"""Folders of pictures that say what they hold: by a JSON file, and by a mark in the header of each picture."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.pixels import to_pictures
from runtime.files import plain, write_atomic, write_json

MANIFEST = "manifest.json"  # of a folder of samples
_MARK, SEED = "folder", "seed"  # keywords of the mark, and of the seed of a sample, in the header of a picture
SHEETS = ("contact_sheet.png", "sheet.png")  # bear no mark

_END = b"\0\0\0\0IEND\xaeB`\x82"  # of every PNG


def claim_folder(out_dir: Path, name: str, wanted: dict[str, Any]) -> str:
    """Write what a folder is to hold into a JSON file in it, unless that is there; return the mark of its pictures.

    Args:
        out_dir: made if need be.
        name: of the file. Where it is missing, pictures that are there must bear the mark.
        wanted: plain values, by parts that the error names.
    Raises:
        ValueError: when the folder holds something else.
    """
    path = out_dir / name
    wanted = plain(wanted)
    mark = mark_of(wanted)
    if not path.exists():
        for picture in sorted(out_dir.glob("*.png")):
            found = None if picture.name in SHEETS else whole_png(picture)
            if found and not is_marked(found[1], mark):
                raise ValueError(
                    f"{out_dir} holds {picture.name}, which is not of these settings and this model, and no "
                    f"{name}; accepted: an empty folder"
                )
        write_json(path, wanted)
        return mark
    try:
        there = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({error}); accepted: another folder") from None
    if there != wanted:
        parts = [part for part in wanted if not isinstance(there, dict) or there.get(part) != wanted[part]]
        raise ValueError(
            f"{out_dir} holds results of other {' and '.join(parts)} "
            f"(see its {name}); accepted: an empty folder or the same settings"
        )
    return mark


def mark_of(content: dict[str, Any]) -> str:
    """The mark of the pictures of a folder, by the plain values in its JSON file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def save_png(path: Path, image: torch.Tensor, mark: str, texts: Mapping[str, str]) -> None:
    """Write uint8 (C, H, W) as PNG, atomically, with the mark of its folder and texts by their keywords.

    Who writes them sweeps the folder before.
    """
    (picture,) = to_pictures(image[None])
    info = PngInfo()
    for keyword, text in {_MARK: mark, **texts}.items():
        info.add_text(keyword, text)
    write_atomic(path, lambda temporary: picture.save(temporary, format="png", pnginfo=info), one_of_many=True)


def whole_png(path: Path) -> tuple[tuple[int, int], dict[str, str]] | None:
    """The size (H, W) and the texts of a PNG if it is there and undamaged."""
    try:
        with open_png(path) as image:
            size, texts = image.size[::-1], {k: v for k, v in image.info.items() if isinstance(v, str)}
            image.verify()  # looks at no more than the name of the last chunk
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            return (size, texts) if file.read() == _END else None
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None


def is_marked(texts: Mapping[str, str], mark: str) -> bool:
    """Whether the texts of a picture bear the mark of a folder."""
    return texts.get(_MARK) == mark


def is_sample(path: Path, mark: str) -> bool:
    """Whether a picture was drawn into the folder of a mark for the seed in its name, by its header alone."""
    try:
        with open_png(path) as image:
            texts = image.info
    except (OSError, ValueError, SyntaxError):
        return False
    return is_marked(texts, mark) and str(texts.get(SEED)).zfill(6) == path.stem


def open_png(path: Path) -> Image.Image:
    """Open a PNG of any size: those that the project writes may be larger than Pillow's limit for files of strangers.

    Of others nothing but the header may be read.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(path, formats=("PNG",))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
