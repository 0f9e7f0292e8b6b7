"""The drawer of sheets: where pixels of images come to lie, in every mode and size."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.pixels import to_pictures
from runtime.sheet import RED, WIDTH, Row, draw_sheet

GREEN, BLUE = (10, 200, 30), (20, 30, 220)


def plain(height: int, width: int, colour: tuple[int, ...] = GREEN, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), colour)


def box(sheet: np.ndarray, colour: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Top, left, height and width of what has a colour; it must fill its box."""
    found = (sheet == colour).all(2)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    top, left, height, width = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
    assert found.sum() == height * width
    return int(top), int(left), int(height), int(width)


def test_small_images_grow_by_a_whole_number_and_stand_in_columns():
    sheet = np.array(draw_sheet([Row([plain(16, 12), plain(16, 12, BLUE)], "data"), Row([plain(32, 32, (9, 9, 9))])]))
    green, blue, below = (box(sheet, colour) for colour in (GREEN, BLUE, (9, 9, 9)))
    assert green[2:] == blue[2:] == (16 * 9, 12 * 9) and below[2:] == (128, 128)
    assert green[0] == blue[0] and below[0] > green[0] + green[2]
    assert abs((green[1] + green[3] / 2) - (below[1] + below[3] / 2)) <= 1  # the middle of one column


def test_enlarged_pixels_stay_squares_whatever_the_factor():
    chess = np.indices((3, 5)).sum(0) % 2 * 255
    images = [
        Image.fromarray(chess.astype(np.uint8)),
        plain(47, 47),
    ]  # of the greater height; 47 / 3 is no whole number
    sheet = np.array(draw_sheet([Row(images)]))
    top, _, height, _ = box(sheet, GREEN)
    assert height == 3 * 47
    one = np.array(draw_sheet([Row(images[:1])]))[16:-16, 16:-16]
    assert one.shape[:2] == (33 * 3, 33 * 5)
    assert np.array_equal(one[..., 0], np.kron(chess, np.ones((33, 33))))
    line = sheet[top : top + height, 16 + 20, 0]  # three squares of 47 pixels
    assert [int(line[i]) for i in (0, 46, 47, 93, 94, 140)] == [0, 0, 255, 255, 0, 0]


def test_transparent_pixels_show_a_checkerboard_and_grey_stays_grey():
    clear, half, grey = plain(64, 64, (*GREEN, 0), "RGBA"), plain(64, 64, (0, 0, 0, 51), "RGBA"), plain(64, 64, 77, "L")
    sheet = np.array(draw_sheet([Row([clear, half, grey])]))
    tiles = [sheet[16:144, 16 + 136 * i :][:, :128] for i in range(3)]
    assert np.array_equal(tiles[0][:, :, 0], np.kron(np.indices((16, 16)).sum(0) % 2 * -32 + 236, np.ones((8, 8))))
    assert set(np.unique(tiles[1])) == {round(0.8 * 204), round(0.8 * 236)}
    assert (tiles[2] == 77).all()


def test_sizes_in_proportion_with_a_frame():
    sizes = [(4, 3), (8, 6), (16, 12)]
    rows = [[plain(*size, colour) for size in sizes] for colour in (GREEN, BLUE)]
    sheet = np.array(draw_sheet([Row(rows[0], framed=[1], true_sizes=True), Row(rows[1])], ["a", "b", "c"]))
    columns = (sheet == GREEN).all(2).sum(0)
    heights = sorted(set(columns[columns > 0].tolist()))
    assert len(heights) == 3 and heights == [heights[0], 2 * heights[0], 4 * heights[0]]
    bottoms = {int(np.flatnonzero((sheet[:, x] == GREEN).all(1))[-1]) for x in np.flatnonzero(columns)}
    assert len(bottoms) == 1
    frame = (sheet == RED).all(2)
    width = heights[1] // 8 * 6
    assert frame.sum() == (heights[1] + 6) * (width + 6) - heights[1] * width
    assert (sheet == BLUE).all(2).any(0).sum() == 3 * 108  # below, all at the height of the tallest


@pytest.mark.parametrize("true_sizes", [True, False])
@pytest.mark.parametrize(("height", "width", "count"), [(1000, 3000, 1), (64, 64, 40), (3000, 10, 2), (1, 1, 1)])
def test_sheets_are_neither_too_wide_nor_empty(true_sizes, height, width, count):
    images = [plain(height, width)] * count
    sheet = draw_sheet([Row(images, "x", ["1"] * count, true_sizes=true_sizes)])
    assert sheet.width <= WIDTH and (np.array(sheet) == GREEN).all(2).any()


def test_long_texts_do_not_run_into_each_other():
    rows = [Row([plain(128, 128)] * 2, captions=["W" * 400, ""])]
    sheet = np.array(draw_sheet(rows))
    assert sheet.shape[1] < 400 and (sheet[-36:, sheet.shape[1] // 2 :] == 255).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_tensors_become_pictures(dtype, channels, mode):
    pixels = torch.arange(2 * channels * 6, dtype=torch.uint8).reshape(2, channels, 3, 2) * 5
    images = pixels if dtype == torch.uint8 else (pixels.double() / 127.5 - 1).to(dtype)
    pictures = to_pictures(images)
    assert [p.mode for p in pictures] == [mode] * 2 and pictures[0].size == (2, 3)
    assert np.array_equal(np.array(pictures[1]).reshape(3, 2, channels), pixels[1].permute(1, 2, 0).numpy())
