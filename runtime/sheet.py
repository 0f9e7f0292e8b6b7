"""One picture of many images: labelled rows, enlarged to a readable size without smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from runtime.files import write_atomic

WIDTH = 2048  # of a sheet in pixels, at most; longer texts alone can make it wider
_READABLE = 128  # side of a small image on the sheet, about
_TEXT = 160  # widest caption; longer ones are cut
_MARGIN, _GAP, _FONT, _LINE, _FRAME, _SQUARE = 16, 8, 14, 20, 3, 8
_INK, _FAINT, RED = (40, 40, 40), (110, 110, 110), (214, 39, 40)
_CHECKERS = (236, 204)  # greys of the board behind transparent pixels

Size = tuple[int, int]  # (width, height), as Pillow has it


@dataclass(frozen=True)
class Row:
    """Images beside each other, of any sizes and modes.

    images: shown at one height, each in its column. label: above the row. captions: below the images, "" for none.
    framed: positions of images with a red frame. true_sizes: show sizes in proportion, bottoms on one line, instead.
    """

    images: Sequence[Image.Image]
    label: str = ""
    captions: Sequence[str] = ()
    framed: Sequence[int] = ()
    true_sizes: bool = False


def save_sheet(path: Path, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Write `draw_sheet` as a PNG, atomically."""
    write_atomic(path, lambda temporary: draw_sheet(rows, columns).save(temporary, format="png"))


def draw_sheet(rows: Sequence[Row], columns: Sequence[str] = ()) -> Image.Image:
    """The rows below each other; pixels of small images become squares, large images are reduced.

    Args:
        rows: at least one; none is empty.
        columns: titles, above the first row whose images stand in columns.
    """
    font = ImageFont.load_default(_FONT)

    def wide(text: str) -> int:
        return round(font.getlength(text))

    in_columns = [row for row in rows if not row.true_sizes]
    count = max((len(row.images) for row in in_columns), default=1)
    room = max(1, (WIDTH - 2 * _MARGIN + _GAP) // count - _GAP)
    texts = [*columns, *(text for row in in_columns for text in row.captions)]
    widths = [width for row in in_columns for width, _ in _sizes(row, room)]
    column = max([*widths, *(min(_TEXT, wide(text)) for text in texts)], default=0)
    content = count * (column + _GAP) - _GAP if in_columns else WIDTH - 2 * _MARGIN
    sizes = [_true_sizes(row, content) if row.true_sizes else _sizes(row, room) for row in rows]
    captions = [[*row.captions, *[""] * (len(row.images) - len(row.captions))] for row in rows]
    slots = [  # widths of what the images and captions of each row stand in
        [max(size[0], wide(text)) if row.true_sizes else column for size, text in zip(sizes[i], captions[i])]
        for i, row in enumerate(rows)
    ]
    width = max(content, *(sum(row) + _GAP * (len(row) - 1) for row in slots), *(wide(row.label) for row in rows))
    titled = next((row for row in in_columns if columns), None)
    heights = [max(height for _, height in row) for row in sizes]
    lines = [bool(row.label) + (row is titled) + any(row.captions) for row in rows]
    height = sum(heights) + _LINE * sum(lines) + _MARGIN * (len(rows) + 1)
    sheet = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, middle: float, top: int, limit: int, colour: tuple[int, int, int]) -> None:
        while text and wide(text) > limit:
            text = text.removesuffix("...")[:-1] + "..." if len(text) > 3 else ""
        draw.text((middle, top), text, fill=colour, font=font, anchor="ma")

    top = _MARGIN
    for i, row in enumerate(rows):
        if row.label:
            draw.text((_MARGIN, top - 1), row.label, fill=_INK, font=font)
        top += _LINE * (bool(row.label) + (row is titled))
        left = _MARGIN
        for j, (image, (w, h), slot) in enumerate(zip(row.images, sizes[i], slots[i])):
            middle, framed = left + slot / 2, j in row.framed
            x, y = left + (slot - w) // 2, top + heights[i] - h
            sheet.paste(_scaled(image, (w, h)), (x, y))
            if framed:
                box = (x - _FRAME, y - _FRAME, x + w + _FRAME - 1, y + h + _FRAME - 1)
                draw.rectangle(box, outline=RED, width=_FRAME)
            if row is titled and j < len(columns):
                write(columns[j], middle, top - _LINE, slot, _INK)
            write(captions[i][j], middle, top + heights[i] + 3, slot, RED if framed else _FAINT)
            left += slot + _GAP
        top += heights[i] + _LINE * any(row.captions) + _MARGIN
    return sheet


def _sizes(row: Row, room: int) -> list[Size]:
    """Sizes of one height, at most `room` wide: that of the tallest image times a whole number, if it is not large."""
    tallest = max(row.images, key=lambda image: image.height)
    widest = max(image.width / image.height for image in row.images) * tallest.height
    factor = max(1, min(round(_READABLE / math.sqrt(tallest.width * tallest.height)), int(room / widest)))
    height = min(factor * tallest.height, room * tallest.height / widest)
    return [(max(1, round(i.width * height / i.height)), max(1, round(height))) for i in row.images]


def _true_sizes(row: Row, width: int) -> list[Size]:
    """Sizes in proportion, by a whole number where it is not below 1, that fill a row of at most `width`, no taller."""
    scale = (width - _GAP * (len(row.images) - 1)) / sum(image.width for image in row.images)
    scale = min(scale, width / max(image.height for image in row.images))
    scale = int(scale) if scale >= 1 else max(scale, 1e-6)
    return [(max(1, int(i.width * scale)), max(1, int(i.height * scale))) for i in row.images]


def _scaled(image: Image.Image, size: Size) -> Image.Image:
    """An RGB image of a size: enlarged pixels are squares, transparent ones show a checkerboard."""
    image = image.convert("RGBA" if image.mode in ("RGBA", "LA", "PA") else "RGB")
    factor = -(-size[1] // image.height)
    if factor > 1:  # to a whole number first, and then back: squares of equal size where it is none
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BOX if factor > 1 else Image.Resampling.LANCZOS)
    if image.mode == "RGB":
        return image
    board = Image.new("L", (-(-size[0] // _SQUARE), -(-size[1] // _SQUARE)))
    board.putdata([_CHECKERS[(x + y) % 2] for y in range(board.height) for x in range(board.width)])
    board = board.resize((board.width * _SQUARE, board.height * _SQUARE), Image.Resampling.NEAREST)
    below = board.crop((0, 0, *size)).convert("RGB")
    below.paste(image, mask=image.getchannel("A"))
    return below
