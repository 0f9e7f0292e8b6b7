"""The enlarged kernel as a product of low rank, against convolution with the resampled kernel in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.operators import compiled
from models.operators.sparse_conv.enlarged import axis, enlarged, pays

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}
CASES = [  # lattice, channels, k, kernel_shape
    ((20, 17), 3, 3, (5, 7)),
    ((21, 40), 64, 7, (29, 13)),
    ((16, 33), 16, 5, (9, 3)),  # shrunken along one axis
    ((10, 12), 16, 7, (3, 5)),
    ((5, 6), 20, 7, (13, 13)),  # windows beyond both sides
    ((9, 4), 4, 9, (11, 9)),
    ((7, 8), 5, 1, (3, 3)),
]


def draw(size, channels, k, dtype=torch.float32, batch=2):
    x, residual = torch.randn(2, batch, *size, channels).to(dtype)
    return x, torch.randn(channels, k, k), torch.rand(size) + 0.5, residual


def overlaps_in_loops(k, kernel_shape, span):
    """How much of the pixels around a middle each of the k cells covers that `span` pixels are divided into."""
    return torch.tensor([
        [max(0.0, min(t + 0.5, (i - k / 2 + 1) * span / k) - max(t - 0.5, (i - k / 2) * span / k))
         for t in range(-(kernel_shape // 2), kernel_shape // 2 + 1)] for i in range(k)
    ], dtype=torch.float64)  # fmt: skip


def direct(x, weight, kernel_shape, scale=None, residual=None, span=None):
    kernel = weight.double().unsqueeze(1)
    if span is None:
        kernel = F.interpolate(kernel, size=kernel_shape, mode="bilinear", align_corners=False)
    else:
        u, v = (overlaps_in_loops(weight.shape[-1], side, covered) for side, covered in zip(kernel_shape, span))
        kernel = torch.einsum("ocij,it,js->octs", kernel, u, v)
    padding = (kernel_shape[0] // 2, kernel_shape[1] // 2)
    out = F.conv2d(x.double().permute(0, 3, 1, 2), kernel, padding=padding, groups=len(weight)).permute(0, 2, 3, 1)
    out = out if scale is None else out * scale.view(*x.shape[1:3], 1)
    return out if residual is None else out + residual


def assert_close(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.fixture(params=["compiled", "direct"])
def engine(request, monkeypatch):
    if request.param == "direct":
        monkeypatch.setattr(compiled, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("needs a C compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_direct_convolution(case, dtype, engine):
    size, channels, k, kernel_shape = case
    x, weight, scale, residual = draw(size, channels, k, dtype)
    expected = direct(x, weight, kernel_shape, scale, residual)
    for band in (None, 1, 3, size[0]):
        assert_close(enlarged(x, weight, kernel_shape, scale, residual, band=band), expected, dtype)
    assert_close(enlarged(x, weight, kernel_shape), direct(x, weight, kernel_shape), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("k", "kernel_shape", "span"),
    [
        (3, (7, 7), (6.0, 6.0)),
        (7, (15, 29), (14.0, 28.0)),
        (5, (9, 13), (7.5, 11.25)),
        (7, (7, 9), (7.0, 7.21875)),  # the training size along one axis
        (5, (11, 5), (10.0, 4.9)),  # coarser along one: no product
        (3, (1, 3), (0.75, 1.5)),
    ],
)
def test_cells_overlap_as_in_the_direct_convolution(k, kernel_shape, span, dtype, engine):
    x, weight, scale, residual = draw((20, 18), 20, k, dtype)
    x.requires_grad_()
    expected = direct(x, weight, kernel_shape, scale, residual, span)
    found = enlarged(x, weight, kernel_shape, scale, residual, span=span)
    assert_close(found, expected, dtype)
    dout = torch.randn_like(x)
    assert_close(*(torch.autograd.grad(out, x, dout.to(out.dtype))[0] for out in (found, expected)), dtype)
    assert pays(k, kernel_shape, span) <= (min(span) >= k)


@torch.no_grad()
@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
def test_bands_and_threads_change_no_bit_of_the_compiled_product():
    x, weight, scale, residual = draw((50, 41), 40, 7)
    threads, results = torch.get_num_threads(), []
    try:
        for count, band in ((1, None), (2, None), (3, 7), (16, None), (1, 50)):
            torch.set_num_threads(count)
            results.append(enlarged(x, weight, (13, 11), scale, residual, band=band))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_some_rows_are_those_of_all(dtype, engine):
    x, weight, scale, residual = draw((19, 11), 6, 5, dtype)
    expected = direct(x, weight, (9, 9), scale, residual)
    some = enlarged(x, weight, (9, 9), scale.flatten(), residual, first_row=4, rows=7, band=3)
    assert_close(some, expected[:, 4:11], dtype)
    assert_close(enlarged(x, weight, (9, 9), scale, residual, first_row=16), expected[:, 16:], dtype)


def test_strides_do_not_matter(engine):
    x, weight, scale, residual = draw((9, 10), 8, 3)
    across = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    expected = enlarged(x, weight, (5, 5), scale, residual)
    assert torch.equal(enlarged(across, weight, (5, 5), scale, residual), expected)
    assert_close(enlarged(x, weight.mT, (5, 5)), direct(x, weight.mT, (5, 5)), torch.float32)


@pytest.mark.parametrize("k", [3, 5, 7, 9])
def test_segments_bound_the_support_of_the_resampling(k):
    bilinear = [(kernel_shape, None) for kernel_shape in range(3, 60, 2)]
    overlaps = [(2 * math.ceil((span - 1) / 2) + 1, span) for span in (k * n / 24 for n in range(24, 200))]
    for kernel_shape, span in bilinear + overlaps:
        weights, first = axis(k, kernel_shape, span, CPU)
        weights, first = weights.clone(), first.tolist()
        assert first == sorted(first) and len(first) == k
        for i in range(k - 1):
            weights[i : i + 2, first[i] : first[i + 1]].zero_()
        assert weights.abs().max() < 1e-6


def test_pays_where_kernels_are_enlarged():
    assert all(pays(7, kernel_shape) for kernel_shape in [(11, 11), (13, 13), (29, 29), (7, 29)])
    assert not any(pays(7, kernel_shape) for kernel_shape in [(3, 3), (7, 7), (3, 29)])
    assert pays(7, (15, 15), (14.0, 14.0)) and not pays(7, (101, 5), (100.0, 4.0))


def test_is_opaque_to_the_compiler():
    x, weight, scale, residual = draw((6, 7), 4, 3)
    arguments = (x, weight, (5, 5), scale, residual, 1, 4, None)
    torch.library.opcheck(torch.ops.infty_diff.enlarged.default, arguments)
    x.requires_grad_()
    arguments = (x, weight, (5, 5), scale, residual, 0, 6, None)
    torch.library.opcheck(torch.ops.infty_diff.enlarged.default, arguments)
    torch.library.opcheck(torch.ops.infty_diff.enlarged.default, (*arguments, (4.5, 4.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_direct_convolution(case, dtype, engine):
    size, channels, k, kernel_shape = case
    x, weight, scale, residual = draw(size, channels, k, dtype)
    dout = torch.randn_like(x)
    for factor, added in ((scale, residual), (None, None)):
        inputs = [t.detach().clone().requires_grad_() for t in (x, added) if t is not None]
        out = enlarged(inputs[0], weight, kernel_shape, factor, *inputs[1:])
        exact = [t.detach().double().requires_grad_() for t in inputs]
        expected = torch.autograd.grad(direct(exact[0], weight, kernel_shape, factor, *exact[1:]), exact, dout.double())
        for found, wanted in zip(torch.autograd.grad(out, inputs, dout), expected):
            assert_close(found, wanted, dtype)


def test_other_gradients_and_wrong_shapes_are_refused():
    x, weight, scale, residual = draw((6, 7), 4, 3)
    for arguments, rows in (((x, weight.clone().requires_grad_()), 6), ((x.clone().requires_grad_(), weight), 4)):
        with pytest.raises(ValueError, match="weight requires a gradient, or x for some rows"):
            enlarged(*arguments, (5, 5), rows=rows)
        with torch.no_grad():
            enlarged(*arguments, (5, 5), rows=rows)
    for arguments, options, message in [
        ((x, weight[1:], (5, 5)), {}, "weight is of shape"),
        ((x, weight, (4, 5)), {}, r"kernel_shape is \(4, 5\)"),
        ((x, weight, (5, 5), scale[1:]), {}, "scale is of shape"),
        ((x, weight, (5, 5), scale, residual.double()), {}, "residual is torch.float64"),
        ((x, weight, (5, 5)), {"first_row": 5, "rows": 2}, "first_row is 5 and rows 2"),
        ((x, weight, (5, 5)), {"band": 0}, "band is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            enlarged(*arguments, **options)
