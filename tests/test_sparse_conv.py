"""The sparse convolution, against its definition in loops."""

import logging

import pytest
import torch
import torch.nn.functional as F

from diffusion.coordinates import Points, gather_points, image_to_points
from models.operators import dispatch
from models.operators.dispatch import AUTOMATIC, get_backend
from models.operators.sparse_conv.backend import resample_kernel, resampled_shape, resampled_size, window_counts
from networks import random_points

CPU = torch.device("cpu")
# size, training size, kernel size, points
CASES = (
    ((6, 5), (6, 5), 3, 12),
    ((6, 5), (6, 5), 7, None),
    ((4, 9), (4, 4), 3, 10),
    ((3, 8), (6, 4), 5, None),
    ((2, 2), (2, 2), 5, 1),
)


def convolve_in_loops(x, weight, points, kernel_shape, kernel_size, groups):
    """k² / count · Σ over present pixels of the window, point by point."""
    height, width = points.size
    weight = resample_kernel(weight, kernel_shape)
    ids = points.ids().expand(x.shape[0], -1).tolist()
    c_out, per_group = weight.shape[0], weight.shape[1]
    out = torch.zeros(x.shape[0], points.count, c_out, dtype=x.dtype)
    for b, item in enumerate(ids):
        position = {pixel: m for m, pixel in enumerate(item)}
        for m, pixel in enumerate(item):
            count = 0
            for i in range(kernel_shape[0]):
                for j in range(kernel_shape[1]):
                    row, col = pixel // width + i - kernel_shape[0] // 2, pixel % width + j - kernel_shape[1] // 2
                    there = position.get(row * width + col) if 0 <= row < height and 0 <= col < width else None
                    if there is None:
                        continue
                    count += 1
                    for o in range(c_out):
                        first = o // (c_out // groups) * per_group
                        out[b, m, o] += (weight[o, :, i, j] * x[b, there, first : first + per_group]).sum()
            out[b, m] *= kernel_size**2 / count
    return out


@pytest.mark.parametrize("name", AUTOMATIC)
@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize(("size", "train_size", "kernel_size", "count"), CASES)
def test_convolution_is_its_definition(name, depthwise, size, train_size, kernel_size, count):
    torch.manual_seed(0)
    batch, channels = 2, 4
    groups = channels if depthwise else 1
    points, kernel_shape = random_points(batch, size, count), resampled_shape(kernel_size, size, train_size)
    x = torch.randn(batch, points.count, channels, dtype=torch.float64)
    weight = torch.randn(channels, channels // groups, kernel_size, kernel_size, dtype=torch.float64)
    backend = get_backend(name)
    plan = backend.plan(points, batch, kernel_shape, kernel_size, CPU)
    expected = convolve_in_loops(x, weight, points, kernel_shape, kernel_size, groups)
    torch.testing.assert_close(backend.conv(x, weight, plan, groups), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(backend.conv(x, weight, plan, groups, residual=x), x + expected, rtol=1e-5, atol=1e-6)


def one_rounding(backend, dtype, autocast=False):
    """A kernel of a single 1 leaves the scaling alone: the result must be that of float64, rounded once."""
    torch.manual_seed(0)
    size, kernel_size, batch, channels = (9, 14), 7, 2, 4
    for points in (random_points(batch, size, 70), Points(size)):
        x = torch.randn(batch, points.count, channels).to(dtype)
        weight = torch.zeros(channels, 1, kernel_size, kernel_size)
        weight[:, :, kernel_size // 2, kernel_size // 2] = 1
        given = (x.float(), weight) if autocast else (x, weight.to(dtype))
        if not backend.depthwise:
            given = given[0], torch.diag_embed(given[1].squeeze(1).permute(1, 2, 0)).permute(2, 3, 0, 1)
        plan = backend.plan(points, batch, (kernel_size, kernel_size), kernel_size, CPU)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            out = backend.conv(*given, plan, channels // given[1].shape[1])
        counts = window_counts(points, (kernel_size, kernel_size), CPU).unsqueeze(2)
        expected = x.double() * kernel_size**2 / counts
        assert ((out.double() - expected).abs() <= torch.finfo(dtype).eps / 2 * 1.001 * expected.abs()).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AUTOMATIC)
def test_the_density_is_not_rounded_in_half_precision(name, dtype, autocast):
    one_rounding(get_backend(name), dtype, autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AUTOMATIC)
def test_features_may_be_of_half_precision_where_the_kernel_is_not(name, dtype):
    """Without autocast; off by two roundings at most, of each tap and of the result."""
    backend, exact = get_backend(name), get_backend("torch_dense")
    for points in (Points((9, 7)), random_points(2, (9, 7), 20)):
        x, weight = torch.randn(2, points.count, 3).to(dtype), torch.randn(3, 1, 5, 5)
        plan, exact_plan = (some.plan(points, 2, (5, 5), 5, CPU) for some in (backend, exact))
        out = backend.conv(x, weight, plan, 3)
        assert out.dtype == dtype
        expected, size = (
            exact.conv(f(x.double()), f(weight.double()), exact_plan, 3) for f in (torch.clone, torch.abs)
        )
        assert ((out.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize(("size", "kernel_shape"), [((5, 8), (3, 7)), ((4, 4), (13, 13)), ((1, 6), (3, 5))])
def test_counts_are_a_convolution_of_ones(size, kernel_shape):
    total = size[0] * size[1]
    box, padding = torch.ones(1, 1, *kernel_shape), (kernel_shape[0] // 2, kernel_shape[1] // 2)
    for points in (Points(size), random_points(3, size, max(total // 3, 1))):
        present = torch.zeros(3, total).scatter(1, points.ids().expand(3, -1), 1.0).view(3, 1, *size)
        counts = gather_points(F.conv2d(present, box, padding=padding), points).squeeze(2)
        assert torch.equal(window_counts(points, kernel_shape, CPU).expand(3, -1).float(), counts)


def test_extents_follow_each_axis():
    assert [resampled_size(7, n, 32) for n in (16, 32, 64, 128)] == [3, 7, 13, 29]
    assert [resampled_size(3, n, 16) for n in (4, 16, 32, 64)] == [3, 3, 5, 13]
    assert resampled_size(1, 32, 32) == 1
    assert resampled_shape(7, (64, 32), (32, 32)) == (13, 7)
    assert resampled_shape(7, (32, 96), (32, 64)) == (7, 11)
    for n in range(1, 200):
        assert resampled_size(5, n, 40) % 2 == 1


def test_constant_functions_do_not_notice_thinning_or_resolution():
    """The result for a constant depends on the kernel alone, at the border too, whatever the points and the lattice."""
    backend, weight = get_backend("torch_dense"), torch.full((1, 1, 7, 7), 0.02)
    for size in ((16, 16), (32, 16), (24, 40)):
        kernel_shape = resampled_shape(7, size, (16, 16))
        for points in (Points(size), Points(size, torch.randperm(size[0] * size[1])[:60].unsqueeze(0))):
            plan = backend.plan(points, 1, kernel_shape, 7, CPU)
            out = backend.conv(torch.ones(1, points.count, 1), weight, plan, 1)
            torch.testing.assert_close(out, torch.full_like(out, 49 * 0.02))


def test_the_full_lattice_is_not_copied():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    x = image_to_points(image)
    assert x.data_ptr() == image.data_ptr()
    assert x.reshape(2, 4, 5, 3).data_ptr() == image.data_ptr()


def test_back_ends_by_name(monkeypatch, caplog):
    with pytest.raises(ValueError, match=r"model\.backend is 'nonsense'; accepted: auto, native, torch_dense"):
        get_backend("nonsense")
    monkeypatch.setitem(dispatch._BACKENDS, "spconv", "no_such_folder:no_such_class")
    with pytest.raises(ValueError, match="'spconv', which is not installed: No module"):
        get_backend("spconv")
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert get_backend("auto").name in AUTOMATIC
    assert caplog.text.count("model.backend=auto: using") == 1
