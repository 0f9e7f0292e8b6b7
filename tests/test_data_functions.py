"""Procedural functions: one function at every lattice, cell averages, no aliasing."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.cell_averages import Cells, ellipse, gaussian, half_plane, rounded_box, wave
from data.functions import FunctionImages, ProceduralFunctions
from data.pixels import to_float, to_uint8


def _supersampled(function, size, factor=32):
    """Cell averages by brute force: the mean of point samples inside each cell."""
    fine = Cells.of((size[0] * factor, size[1] * factor))
    values = function(fine.y.double(), fine.x.double()).double()
    return F.avg_pool2d(values.expand(1, 1, size[0] * factor, size[1] * factor), factor)[0, 0].float()


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (33, 21)])
@pytest.mark.parametrize("factor", [2, 4])
def test_one_function_at_every_lattice(size, factor):
    functions = ProceduralFunctions(3)
    coarse = functions.evaluate_many(range(12), size)
    fine = functions.evaluate_many(range(12), (size[0] * factor, size[1] * factor))
    error = coarse - F.avg_pool2d(fine, factor)
    # in units of grey levels of 255: tiny on average, larger only in the few cells with corners
    assert error.square().mean().sqrt() * 127.5 < 1.5
    assert error.abs().mean() * 127.5 < 0.3
    # the same is not true of the fine lattice's point samples, so the averages are what makes it hold
    points = coarse - fine[..., factor // 2 :: factor, factor // 2 :: factor]
    assert points.square().mean() > 20 * error.square().mean()


@pytest.mark.parametrize("size", [(16, 16), (9, 20)])
def test_half_plane_is_the_exact_coverage(size):
    for slope_y, slope_x, offset in ((1.0, 0.0, 0.43), (0.0, -1.0, -0.31), (0.7, -1.3, 0.11), (2.0, 0.1, 0.8)):
        cells = Cells.of(size)
        exact = half_plane(cells, slope_y * cells.y + slope_x * cells.x - offset, slope_y, slope_x)
        sampled = _supersampled(lambda y, x: slope_y * y + slope_x * x > offset, size)  # noqa: B023
        assert (exact - sampled).abs().max() < 0.04  # the error of 32 x 32 samples
        assert (exact - sampled).abs().mean() < 2e-3


@pytest.mark.parametrize("size", [(40, 40), (30, 56)])
def test_shapes_cover_their_area(size):
    cells = Cells.of(size)
    half = torch.tensor(0.2)
    disc = ellipse(cells, 0.5, 0.45, 0.25, 0.15)
    assert disc.mean() == pytest.approx(math.pi * 0.25 * 0.15, rel=5e-3)
    box = rounded_box(cells, 0.5, 0.5, half, half / 2, torch.tensor(0.1))
    assert box.mean() == pytest.approx(0.4 * 0.2 + 2 * (0.4 + 0.2) * 0.1 + math.pi * 0.01, rel=5e-3)
    sampled = _supersampled(lambda y, x: ((y - 0.5) / 0.25) ** 2 + ((x - 0.45) / 0.15) ** 2 < 1, size, 16)
    assert (disc - sampled).abs().max() < 0.08


@pytest.mark.parametrize("size", [(16, 16), (5, 12)])
def test_smooth_parts_are_exact_averages(size):
    cells = Cells.of(size)
    found = gaussian(cells, 0.4, 0.7, 0.1, 0.05)
    wanted = _supersampled(lambda y, x: torch.exp(-(((y - 0.4) / 0.1) ** 2) / 2 - ((x - 0.7) / 0.05) ** 2 / 2), size)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)
    found = wave(cells, 3.3, -7.1, 0.2)
    wanted = _supersampled(lambda y, x: torch.sin(2 * math.pi * (3.3 * y - 7.1 * x + 0.2)), size)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


def test_texture_vanishes_on_a_coarse_lattice():
    assert wave(Cells.of((256, 256)), 0.0, 64.0, 0.1).abs().max() > 0.85
    assert wave(Cells.of((64, 64)), 0.0, 64.0, 0.1).abs().max() < 1e-6  # one period per cell averages to nothing
    assert wave(Cells.of((32, 32)), 0.0, 80.0, 0.1).abs().max() < 0.13
    # the near hill's grass (60 to 90 cycles) is visible at 512 and gone at 32
    rows = ProceduralFunctions(0).evaluate_many(range(16), (512, 512))[:, :, -16:]
    coarse = ProceduralFunctions(0).evaluate_many(range(16), (32, 32))[:, :, -1:]

    def fine_energy(row):
        spectrum = torch.fft.rfft(row.mean(2)).abs().square()
        return (spectrum[..., 12:].sum(-1) / row.shape[-1] ** 2).mean()

    assert fine_energy(rows) > 20 * fine_energy(coarse)


def test_values_depend_on_seed_and_index_alone():
    functions = ProceduralFunctions(5)
    size = (24, 40)
    many = to_uint8(functions.evaluate_many([7, 0, 7, 123456789012], size))
    assert torch.equal(many[0], many[2])
    for item, index in zip(many, (7, 0, 7, 123456789012)):
        assert torch.equal(item, to_uint8(ProceduralFunctions(5).evaluate(index, size)))
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many[0], to_uint8(ProceduralFunctions(6).evaluate(7, size)))
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    functions.evaluate(1, size)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()


def test_channels_and_range():
    functions = ProceduralFunctions(1)
    rgb, grey, rgba = (functions.evaluate_many(range(20), (20, 28), c) for c in (3, 1, 4))
    assert rgb.shape == (20, 3, 20, 28) and grey.shape == (20, 1, 20, 28) and rgba.shape == (20, 4, 20, 28)
    assert rgba.dtype == torch.float32 and rgba.min() >= -1 and rgba.max() <= 1
    assert torch.equal(rgba[:, :3], rgb)
    luma = 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]
    torch.testing.assert_close(grey[:, 0], luma, atol=1e-5, rtol=0)
    assert (rgba[:, 3, -1] == 1).all()  # the foreground is opaque
    assert (rgba[:, 3, 0] == -1).float().mean() > 0.9  # hardly anything reaches the top of the sky
    assert rgb.std(0).mean() > 0.2  # and the functions differ


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (513, 3)])
def test_extreme_lattices_are_finite(size):
    assert ProceduralFunctions(0).evaluate(0, size).isfinite().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ProceduralFunctions(-1), "data.seed is -1; accepted: integers >= 0"),
        (lambda: ProceduralFunctions(0).evaluate(-2, (4, 4)), "index is -2"),
        (lambda: ProceduralFunctions(0).evaluate(0, (4, 4), 2), "data.channels is 2; accepted: 1"),
        (lambda: ProceduralFunctions(0).evaluate(0, (0, 4)), "data.img_size, data.img_width are (0, 4)"),
        (lambda: FunctionImages(0, 0, (4, 4)), "data.num_images is 0; accepted: integers >= 1"),
        (lambda: FunctionImages(0, 1, (4, 4), in_memory="maybe"), "data.in_memory is 'maybe'; accepted: auto"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_data_set_of_functions():
    kept = FunctionImages(2, 70, (10, 14), first=5)
    lazy = FunctionImages(2, 70, (10, 14), first=5, in_memory="never")
    assert kept.pixels.shape == (70, 3, 10, 14) and lazy.pixels is None and len(lazy) == 70
    for i in (0, 63, 64, 69):
        assert torch.equal(kept[i], lazy[i])
        assert torch.equal(lazy[i], to_uint8(ProceduralFunctions(2).evaluate(5 + i, (10, 14))))
    assert kept.fingerprint() == lazy.fingerprint()
    assert kept.item_name(1) == "function 6 of seed 2"
    others = [
        FunctionImages(3, 70, (10, 14), first=5),
        FunctionImages(2, 69, (10, 14), first=5),
        FunctionImages(2, 70, (14, 10), first=5),
        FunctionImages(2, 70, (10, 14)),
        FunctionImages(2, 70, (10, 14), 1, first=5),
    ]
    assert len({d.fingerprint() for d in [kept, *others]}) == 6
    with pytest.raises(IndexError):
        lazy[70]


def test_pixel_conversions_are_inverse_and_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_float(levels)
    assert values[0] == -1 and values[255] == 1 and torch.equal(to_uint8(values), levels)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.0])).tolist() == [0, 255, 128]  # 127.5 rounds to even
    assert to_uint8(torch.tensor([0.0019, 0.0041]).sub(1)).tolist() == [0, 1]  # to the nearest, not down
    assert torch.equal(to_uint8(values.double()), levels)
    for convert, wrong in ((to_float, values), (to_uint8, levels)):
        with pytest.raises(ValueError, match="images: dtype"):
            convert(wrong)
