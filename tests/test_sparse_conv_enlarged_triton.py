"""The enlarged kernel in Triton, against float64, on a CPU in its interpreter; and compiled for an H100."""

import pytest
import torch

from models.operators.sparse_conv.enlarged import axis
from test_sparse_conv_enlarged import assert_close, direct, draw

triton_enlarged = pytest.importorskip("models.operators.sparse_conv.triton_enlarged")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(x, weight, kernel_shape, scale=None, residual=None, first_row=0, rows=None, band=None, span=(None, None)):
    axes = [axis(weight.shape[-1], *lengths, DEVICE) for lengths in zip(kernel_shape, span)]
    rows = x.shape[1] - first_row if rows is None else rows
    x, weight, scale, residual = (None if t is None else t.to(DEVICE) for t in (x, weight, scale, residual))
    return triton_enlarged.enlarged(x, weight, *axes, scale, residual, first_row, rows, band).cpu()


@pytest.mark.parametrize(
    ("size", "channels", "k", "kernel_shape", "dtype"),
    [
        ((11, 5), 16, 3, (5, 7), torch.float32),
        ((13, 4), 64, 7, (13, 9), torch.float32),
        ((10, 7), 3, 5, (9, 3), torch.float32),
        ((5, 6), 3, 7, (3, 13), torch.float32),
        ((9, 4), 16, 3, (7, 5), torch.bfloat16),
        ((9, 4), 16, 3, (7, 5), torch.float16),
    ],
)
def test_equals_the_direct_convolution(size, channels, k, kernel_shape, dtype):
    x, weight, scale, residual = draw(size, channels, k, dtype, batch=1)
    expected = direct(x, weight, kernel_shape, scale, residual)
    assert_close(run(x, weight, kernel_shape, scale, residual), expected, dtype)


@pytest.mark.parametrize(
    ("k", "kernel_shape", "span"), [(3, (7, 5), (6.0, 4.2)), (5, (11, 5), (9.5, 5.0)), (3, (9, 9), (9.0, 7.5))]
)
def test_cells_overlap_as_in_the_direct_convolution(k, kernel_shape, span):
    x, weight, scale, residual = draw((9, 6), 5, k, batch=1)
    expected = direct(x, weight, kernel_shape, scale, residual, span)
    assert_close(run(x, weight, kernel_shape, scale, residual, span=span), expected, torch.float32)


@pytest.mark.parametrize("band", [1, 4])
def test_bands_give_the_same_bits(band):
    x, weight, scale, residual = draw((9, 5), 4, 3)
    whole = run(x, weight, (5, 7), scale, residual)
    assert torch.equal(run(x, weight, (5, 7), scale, residual, band=band), whole)
    assert torch.equal(run(x, weight, (5, 7), scale, residual, 2, 5, band), whole[:, 2:7])


def test_scale_and_residual_are_optional():
    x, weight, _, residual = draw((4, 5), 4, 3, batch=1)
    assert_close(run(x, weight, (5, 5)), direct(x, weight, (5, 5)), torch.float32)
    assert_close(run(x, weight, (5, 5), None, residual), direct(x, weight, (5, 5), None, residual), torch.float32)


def test_compiles_for_an_h100(tmp_path):
    from triton_aot import compiled

    kernels = compiled(
        """
import torch
from models.operators.sparse_conv.enlarged import axis
from models.operators.sparse_conv.triton_enlarged import enlarged
for k, kernel_shape, channels, dtype in ((7, 29, 64, torch.float32), (5, 13, 3, torch.bfloat16)):
    x, scale = torch.empty(1, 64, 64, channels, dtype=dtype), torch.empty(64, 64)
    u = axis(k, kernel_shape, kernel_shape - 0.5, x.device)
    enlarged(x, torch.empty(channels, k, k), u, u, scale, x, 0, 64, None)
""",
        tmp_path,
    )
    assert sorted(kernel.name for kernel in kernels) == 2 * ["filter_kernel"] + 2 * ["spread_kernel"]
    assert all(kernel.fits() for kernel in kernels), kernels
