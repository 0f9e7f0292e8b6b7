"""A folder of pictures made from given images: PNGs, a sheet and a report, made once."""

from __future__ import annotations

import atexit
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.opening import parse_json
from data.pixels import to_pictures, to_uint8
from runtime.claimed import claim_folder, is_marked, open_png, save_png, whole_png
from runtime.files import sweep, to_json, write_json
from runtime.lock import FolderLock
from runtime.sheet import Row, save_sheet

_KEYWORD = "result"  # of the text in each picture's header
_SHEET_ROWS = 16


def digest(*parts: Any) -> str:
    """Short digest of tensors by their values, and of plain values by their JSON text."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            sha.update(f"{part.dtype}{tuple(part.shape)}".encode() + part.cpu().contiguous().numpy().tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, allow_nan=False).encode())
    return sha.hexdigest()[:16]


def _parsed(text: str) -> dict[str, Any]:
    """The text in a picture's header; of a picture made elsewhere nothing is known."""
    try:
        return parse_json(text, dict, "header", "an object")
    except ValueError:
        return {}


class Results:
    """Pictures `NAME.png`, then `sheet.png` and `result.json`; `settings.json` says from the start what is made here.

    Each picture carries in its header what it was made from and what was measured on it, so a picture is there with its
    row of the report, or not at all; who asks again for the same is not kept waiting.

    Args:
        folder: made if need be.
        settings: what all pictures depend on beside the model, plain values.
        model: what identifies the model, plain values.
    Raises:
        ValueError: when the folder holds results of other settings or of another model, or another command is in it,
            which one is until `finish`.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], model: dict[str, str]) -> None:
        self._lock = FolderLock(folder)
        self._lock.__enter__()
        atexit.register(self._lock.__exit__, None, None, None)
        try:
            self._mark = claim_folder(folder, "settings.json", {"settings": settings, "model": model})
        except ValueError:
            self._lock.__exit__(None, None, None)
            raise
        sweep(folder, "*")
        self.folder, self._report = folder, {**settings, **model}
        self._rows: dict[str, dict[str, Any]] = {}  # in the order in which pictures were asked for
        self._sheet: list[Row] = []

    def lacks(self, name: str, made_from: str) -> bool:
        """Whether NAME.png, made from inputs of this digest, must still be made; asked of every picture of a report."""
        found = whole_png(self.folder / f"{name}.png")
        own = found is not None and is_marked(found[1], self._mark)
        stored = _parsed(found[1].get(_KEYWORD, "{}")) if found and own else {}
        there = stored.get("made_from") == made_from and isinstance(stored.get("row"), dict)
        self._rows[name] = stored["row"] if there else {}
        return not there

    def row(self, name: str) -> dict[str, Any]:
        """The row of a picture that is there."""
        return self._rows[name]

    def add(self, name: str, made_from: str, image: torch.Tensor, row: dict[str, Any]) -> None:
        """Write an image (C, H, W), in [−1, 1] or uint8, as NAME.png, with its row of the report."""
        text = to_json({"made_from": made_from, "row": row})
        image = image.cpu()
        save_png(
            self.folder / f"{name}.png",
            image if image.dtype == torch.uint8 else to_uint8(image),
            self._mark,
            {_KEYWORD: text},
        )
        self._rows[name] = row

    def show(
        self, label: str, images: Sequence[torch.Tensor], names: Sequence[str], captions: Sequence[str] = ()
    ) -> None:
        """Append a row to the sheet: images (C, H, W) in [−1, 1], then pictures of the folder by their names."""
        if len(self._sheet) < _SHEET_ROWS:
            pictures = [picture for image in images for picture in to_pictures(image[None])]
            self._sheet.append(Row([*pictures, *map(self._picture, names)], label, captions))

    def _picture(self, name: str) -> Image.Image:
        with open_png(self.folder / f"{name}.png") as image:
            return image.copy()

    def finish(self, columns: Sequence[str] = ()) -> dict[str, float]:
        """Write the sheet with titles of its columns, and the report; return the means of what was measured."""
        rows = [{"picture": f"{name}.png", **row} for name, row in self._rows.items()]
        measures: dict[str, list[float]] = {}
        for row in rows:
            for key, value in row.items():
                if isinstance(value, float):
                    measures.setdefault(key, []).append(value)
        means = {key: round(sum(values) / len(values), 4) for key, values in measures.items()}
        save_sheet(self.folder / "sheet.png", self._sheet, columns)
        write_json(self.folder / "result.json", {**self._report, "mean": means, "results": rows})
        self._lock.__exit__(None, None, None)
        return means
