"""Statistics of texture against slow sums, and against waves whose statistics are known."""

import math

import torch

from models.texture import TextureCode, autocorrelation, local_contrast

SHIFTS = [(dy, dx) for dy in range(5) for dx in range(-4, 5) if (dy, dx) > (0, 0)]


def wave(size, rows, cols, phase):
    """A wave with so many periods a cell in each direction, (1, H, W, 1) in float64."""
    y, x = (torch.arange(n, dtype=torch.float64) for n in size)
    return (2 * math.pi * (rows * y[:, None] + cols * x + phase)).cos()[None, ..., None]


def test_local_contrast_cell_by_cell():
    x, radius, floor = torch.randn(2, 7, 9, 2, dtype=torch.float64), 2, 0.3

    def mean(of, row, col):
        rows, cols = slice(max(row - radius, 0), row + radius + 1), slice(max(col - radius, 0), col + radius + 1)
        return of[:, rows, cols].mean((1, 2))

    cells = [(row, col) for row in range(7) for col in range(9)]
    d = torch.stack([x[:, row, col] - mean(x, row, col) for row, col in cells], 1).view_as(x)
    size = torch.stack([(mean(d**2, row, col) + floor**2).sqrt() for row, col in cells], 1).view_as(x)
    torch.testing.assert_close(local_contrast(x, radius, floor), d / size)


def test_faint_texture_beside_a_colour_is_as_large_as_any():
    x = wave((16, 12), 0.2, 0.1, 0.0)
    torch.testing.assert_close(local_contrast(100 * x + 7, floor=0.0), local_contrast(x, floor=0.0))


def test_autocorrelation_cell_by_cell():
    x = torch.randn(2, 8, 12, 3, dtype=torch.float64)
    ours = autocorrelation(x, (4, 3))
    assert ours.shape == (2, len(SHIFTS), 4, 3)
    for i, (dy, dx) in enumerate(SHIFTS):
        for a in range(4):
            for b in range(3):
                cells = [(y, c) for y in range(2 * a, 2 * a + 2) for c in range(4 * b, 4 * b + 4)]
                products = [x[:, y, c] * x[:, y + dy, c + dx] for y, c in cells if y + dy < 8 and 0 <= c + dx < 12]
                expected = sum(products, torch.zeros(2, 3, dtype=torch.float64)).mean(1) / len(cells)
                torch.testing.assert_close(ours[:, i, a, b], expected)


def test_stripes_are_known_by_spacing_and_direction_and_not_by_phase():
    """In a window that whole periods fill, away from the border, means of products are cos(2π·wave·shift) / 2."""
    rows, cols = 0.25, -0.125
    for phase in (0.0, 0.3):
        ours = autocorrelation(wave((32, 32), rows, cols, phase), (4, 4))[0, :, 1, 1]
        expected = [0.5 * math.cos(2 * math.pi * (rows * dy + cols * dx)) for dy, dx in SHIFTS]
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))


def test_half_precision_keeps_faint_texture():
    """Rounded on the way, contrast of the size of bfloat16's steps would be noise."""
    torch.manual_seed(0)
    x, code = (0.9 + 0.01 * wave((16, 8), 0.2, 0.1, 0.0)).bfloat16(), TextureCode((2, 1), 3)
    expected = code(x.float()).detach()
    torch.testing.assert_close(code.bfloat16()(x).float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
