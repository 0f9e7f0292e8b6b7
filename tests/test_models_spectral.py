"""The Fourier layer, against functions known in closed form."""

import math

import pytest
import torch

from models.spectral import SIZES, SpectralConv


def centres(n):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def plane_wave(size, rows, cols, phase=0.4):
    """cos(2π(rows·r + cols·c) + phase) at the cell centres: (1, H, W, 1)."""
    r, c = centres(size[0])[:, None], centres(size[1])
    return torch.cos(2 * math.pi * (rows * r + cols * c) + phase)[None, :, :, None]


def with_weight(layer, value):
    """The layer with the same complex factor at every frequency and pair of channels."""
    layer = layer.double()
    with torch.no_grad():
        layer.weight[..., 0], layer.weight[..., 1] = value.real, value.imag
    return layer


@pytest.mark.parametrize("resize", SIZES)
@pytest.mark.parametrize("size", [(16, 16), (16, 24), (8, 8), (10, 14)])
@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (1, 0), (0, 1), (2, 1), (-2, 1), (-1, 2), (2, 2)])
def test_a_wave_stays_the_same_wave(resize, size, rows, cols):
    layer = with_weight(SpectralConv(1, 1, resize), 1 + 0j)
    target = tuple(SIZES[resize](n) for n in size)
    held = 2 * abs(rows) < target[0] and 2 * cols < target[1]  # below the Nyquist frequency of the coarser grid
    expected = plane_wave(target, rows, cols) * held
    torch.testing.assert_close(layer(plane_wave(size, rows, cols)), expected, rtol=0, atol=1e-10)


def test_complex_weights_turn_the_phase():
    layer = with_weight(SpectralConv(1, 1), 0.5 * complex(math.cos(0.3), math.sin(0.3)))
    torch.testing.assert_close(layer(plane_wave((16, 16), 2, 1)), 0.5 * plane_wave((16, 16), 2, 1, phase=0.7))


@pytest.mark.parametrize(("rows", "cols"), [(5, 0), (0, 4), (4, 1), (-5, 2)])
def test_higher_frequencies_vanish(rows, cols):
    out = with_weight(SpectralConv(1, 1), 1 + 0j)(plane_wave((16, 16), rows, cols))
    assert out.abs().max() < 1e-10


def test_channels_mix_by_frequency():
    torch.manual_seed(0)
    layer = SpectralConv(3, 2).double()
    x = torch.randn(2, 12, 10, 3, dtype=torch.float64)
    out = torch.fft.rfft2(layer(x), dim=(1, 2))
    spectrum, weight = torch.fft.rfft2(x, dim=(1, 2)), torch.view_as_complex(layer.weight.detach())
    torch.testing.assert_close(out[:, 2, 3], torch.einsum("bi,io->bo", spectrum[:, 2, 3], weight[0, :, :, 2, 3]))
    torch.testing.assert_close(out[:, -3, 1], torch.einsum("bi,io->bo", spectrum[:, -3, 1], weight[1, :, :, 1, 1]))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (4, 6), (5, 2)])
@pytest.mark.parametrize("resize", SIZES)
def test_grids_smaller_than_the_modes(size, resize):
    layer = with_weight(SpectralConv(1, 1, resize), 1 + 0j)
    constant = torch.full((2, *size, 1), 0.7, dtype=torch.float64)
    target = tuple(SIZES[resize](n) for n in size)
    torch.testing.assert_close(layer(constant), torch.full((2, *target, 1), 0.7, dtype=torch.float64))


def test_precision_and_errors():
    layer, x = SpectralConv(2, 2), torch.randn(1, 8, 8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x.bfloat16().float()), rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="resize is 'third'"):
        SpectralConv(1, 1, "third")
