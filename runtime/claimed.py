"""Folders of pictures that say what they hold: by a JSON file, and by a mark in the header of each picture."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.pixels import to_pictures
from runtime.files import plain, write_atomic, write_json
from runtime.lock import end_of_trial

# Keywords in the header of a picture: of its mark, of the seed of a sample, and of the SHA-256 of its raw file and of
# its field.
_MARK, SEED, RAW, FIELD = "folder", "seed", "raw", "field"
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
        end_of_trial()
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
    end_of_trial()
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


def whole_png(file: Path | bytes) -> tuple[tuple[int, int], dict[str, str]] | None:
    """The size (H, W) and the texts of a PNG, or of its content, if it is there and undamaged."""
    try:
        content = file if isinstance(file, bytes) else file.read_bytes()
        with open_png(io.BytesIO(content)) as image:
            size, texts = image.size[::-1], _texts(image)
            image.verify()  # looks at no more than the name of the last chunk
        return (size, texts) if content.endswith(_END) else None
    except (OSError, ValueError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None


def texts_of(stream: BinaryIO) -> dict[str, str]:
    """The texts of a PNG, by its header alone; OSError, ValueError or SyntaxError where there is none."""
    with open_png(stream) as image:
        return _texts(image)


def _texts(image: Image.Image) -> dict[str, str]:
    return {str(keyword): text for keyword, text in image.info.items() if isinstance(text, str)}


def is_marked(texts: Mapping[str, str], mark: str) -> bool:
    """Whether the texts of a picture bear the mark of a folder."""
    return texts.get(_MARK) == mark


def open_png(file: Path | BinaryIO) -> Image.Image:
    """Open a PNG of any size: those that the project writes may be larger than Pillow's limit for files of strangers.

    Of others nothing but the header may be read.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(file, formats=("PNG",))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
