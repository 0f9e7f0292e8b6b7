"""One function at many resolutions, as one picture (Figure 2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from diffusion.coordinates import Size

_WIDTH = 2000  # of the picture in pixels, about
_GAP, _MARGIN, _FONT = 16, 24, 24
_FRAME, _MARKED, _INK = 4, (214, 39, 40), (40, 40, 40)


def scale_picture(rows: Sequence[Sequence[Image.Image]], train_size: Size) -> Image.Image:
    """Above, the first row at its true relative scale; below, every row at one width, so that pixels can be compared.

    The training size is framed in red, as in Figure 1. Enlarged pixels stay squares.

    Args:
        rows: per function its images, RGB, in the order of the columns; sizes are those of the columns.
        train_size: (H, W).
    """
    columns = [image.size[::-1] for image in rows[0]]
    room = _WIDTH - 2 * _MARGIN - _GAP * (len(columns) - 1)
    scale = room / sum(width for _, width in columns)
    scale = max(1, int(scale)) if scale >= 1 else scale  # whole factors keep enlarged pixels alike
    true = [(round(height * scale), round(width * scale)) for height, width in columns]
    content = sum(width for _, width in true) + _GAP * (len(columns) - 1)
    tile = (content - _GAP * (len(columns) - 1)) // len(columns)  # width of a column below
    tiles = [(round(tile * height / width), tile) for height, width in columns]
    tallest, tile_height, label = max(h for h, _ in true), max(h for h, _ in tiles), _FONT + _GAP
    sheet = Image.new(
        "RGB",
        (content + 2 * _MARGIN, 2 * _MARGIN + tallest + _GAP + label + len(rows) * (tile_height + _GAP) - _GAP),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN
    for image, size, lattice in zip(rows[0], true, columns):
        _paste(sheet, draw, image, (left, _MARGIN + tallest - size[0]), size, lattice == tuple(train_size))
        left += size[1] + _GAP
    font = ImageFont.load_default(_FONT)
    for column, lattice in enumerate(columns):
        left, marked = _MARGIN + column * (tile + _GAP), lattice == tuple(train_size)
        top = _MARGIN + tallest + _GAP
        text = f"{lattice[0]} x {lattice[1]}" + (" (training)" if marked else "")
        draw.text((left + tile / 2, top), text, fill=_MARKED if marked else _INK, font=font, anchor="ma")
        for row, images in enumerate(rows):
            where = (left, top + label + row * (tile_height + _GAP))
            _paste(sheet, draw, images[column], where, tiles[column], marked)
    return sheet


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, image: Image.Image, at: tuple[int, int], size: Size, marked: bool
) -> None:
    factor = max(1, -(-size[0] // image.height))  # whole, and then back: squares of equal size where it is not
    enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    filtering = Image.Resampling.BOX if factor > 1 else Image.Resampling.LANCZOS
    sheet.paste(enlarged.resize(size[::-1], filtering), at)
    if marked:
        box = (at[0] - _FRAME, at[1] - _FRAME, at[0] + size[1] + _FRAME - 1, at[1] + size[0] + _FRAME - 1)
        draw.rectangle(box, outline=_MARKED, width=_FRAME)
