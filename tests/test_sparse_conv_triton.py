"""The depthwise convolution on points in Triton, interpreted without a GPU, against a masked one in float64."""

from __future__ import annotations

import os
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion.coordinates import Points, gather_points, scatter_points
from triton_aot import compiled

triton = pytest.importorskip("triton")
triton_conv = pytest.importorskip("models.operators.sparse_conv.triton_conv")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

# Lattice, kernel_shape of the kernel, points (None: the full lattice), channels, images.
CASES = [
    ((9, 13), (7, 7), 29, 16, 2),
    ((12, 10), (7, 7), 100, 64, 1),
    ((7, 16), (5, 5), 56, 24, 2),
    ((9, 13), (5, 3), None, 24, 2),
    ((6, 7), (3, 3), 1, 64, 3),
    ((8, 8), (3, 3), 64, 16, 1),
    ((5, 6), (29, 29), 20, 16, 1),  # wider than the lattice
    ((4, 9), (13, 13), None, 16, 1),
    ((10, 9), (5, 5), None, 64, 1),
    ((5, 4), (5, 5), 7, 20, 2),  # channels that need masks
]
SMALL = [((7, 10), (5, 5), 30, 16, 2), ((3, 5), (5, 3), None, 16, 2)]
TINY = [((2, 5), (3, 3), 4, 8, 2), ((2, 3), (3, 3), None, 8, 2)]


@pytest.fixture(autouse=True)
def _poison():
    """Fill whatever is allocated without values with NaN and large integers; refuse what varies between runs."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    assert torch.zeros(1, device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Case:
    """Random inputs: float64 on the CPU, values exact in `dtype`; points in random order."""

    def __init__(self, size, kernel_shape, count, channels, batch, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.kernel_shape, self.dtype = kernel_shape, dtype
        index = None
        if count is not None:
            index = torch.rand(batch, size[0] * size[1], generator=generator).argsort(1)[:, :count]
        self.points = Points(size, index)

        def draw(*shape, dtype=dtype):
            return torch.randn(*shape, generator=generator).to(dtype).double()

        rows = self.points.count
        self.x, self.residual, self.grad = (draw(batch, rows, channels) for _ in range(3))
        self.taps = draw(kernel_shape[0] * kernel_shape[1], channels, dtype=torch.float32)
        self.scale = draw(batch if index is not None else 1, rows, 1, dtype=torch.float32)

    def neighbours(self):
        index = None if self.points.index is None else self.points.index.to(DEVICE)
        points = Points(self.points.size, index)
        return triton_conv.neighbours(points, len(self.x), self.kernel_shape, DEVICE)

    def inputs(self):
        """x, taps, residual that want gradients; scale; gradient of the output."""
        leaves = [(self.x, self.dtype), (self.taps, torch.float32), (self.residual, self.dtype)]
        leaves = [value.to(DEVICE, dtype, copy=True).requires_grad_() for value, dtype in leaves]
        return leaves, self.scale.to(DEVICE, torch.float32), self.grad.to(DEVICE, self.dtype)

    def outputs(self):
        """out and the gradients of x, taps, residual."""
        (x, taps, residual), scale, grad = self.inputs()
        out = triton_conv.depthwise(x, taps, scale, self.neighbours(), residual)
        return out, *torch.autograd.grad(out, (x, taps, residual), grad)

    def expected(self):
        x, taps, residual = (value.clone().requires_grad_() for value in (self.x, self.taps, self.residual))
        weight = taps.t().unflatten(1, (1, *self.kernel_shape))  # (C, 1, k'_h, k'_w)
        padding = (self.kernel_shape[0] // 2, self.kernel_shape[1] // 2)
        out = F.conv2d(scatter_points(x, self.points), weight, padding=padding, groups=x.shape[2])
        out = gather_points(out, self.points) * self.scale + residual
        return out, *torch.autograd.grad(out, (x, taps, residual), self.grad)


def assert_close(results, expected, tolerance):
    for result, value in zip(results, expected, strict=True):
        assert result.shape == value.shape
        assert (result.cpu().double() - value).abs().max() <= tolerance * value.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_convolution_and_gradients(case):
    case = Case(*case)
    assert_close(case.outputs(), case.expected(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SMALL)
def test_half_precision_is_summed_in_float32(case, dtype):
    case = Case(*case, dtype)
    out, grad_x, grad_taps, grad_residual = case.outputs()
    assert (out.dtype, grad_x.dtype, grad_taps.dtype) == (dtype, dtype, torch.float32)
    expected = case.expected()
    assert_close((out, grad_x, grad_residual), (expected[0], expected[1], expected[3]), 1e-2)
    assert_close((grad_taps,), expected[2:3], 1e-6)  # rounded nowhere


@pytest.mark.parametrize("case", [CASES[0], SMALL[0]])
def test_entries_of_64_bits(case, monkeypatch):
    def wide(points, taps):
        return 40, torch.int64

    case = Case(*case)
    expected = case.outputs()
    monkeypatch.setattr(triton_conv, "_entry_format", wide)
    assert all(torch.equal(result, value) for result, value in zip(case.outputs(), expected))


def test_chunks_of_the_gradient_of_taps(monkeypatch):
    """Several chunks per image, the last one short, and shorter than the block of a program or longer."""
    monkeypatch.setattr(triton_conv, "_MIN_CHUNK", 16)
    monkeypatch.setattr(triton_conv, "_TAPS_BLOCK", (64, 1))
    case = Case(*SMALL[0])
    assert_close(case.outputs(), case.expected(), 1e-6)  # 4 points to a program, 16 to a chunk
    monkeypatch.setattr(triton_conv, "_TAPS_BLOCK", (512, 1))
    assert_close(case.outputs(), case.expected(), 1e-6)  # 32 to a program


@pytest.mark.parametrize("case", SMALL)
def test_runs_agree_to_the_last_bit(case):
    case = Case(*case)
    first, second = case.outputs(), case.outputs()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_order_of_points_changes_no_bit():
    case = Case(*SMALL[0])
    out, grad_x, _, _ = case.outputs()
    ordered, order = case.points.index.sort(dim=1)
    case.points = Points(case.points.size, ordered)
    for name in ("x", "residual", "grad", "scale"):
        value = getattr(case, name)
        setattr(case, name, value.gather(1, order[:, :, None].expand_as(value)))
    moved = case.outputs()
    for result, value in zip(moved[:2], (out, grad_x)):
        assert torch.equal(result, value.gather(1, order.to(DEVICE)[:, :, None].expand_as(value)))


def test_strided_inputs_and_no_residual():
    case = Case(*SMALL[0])
    (x, taps, _), scale, _ = case.inputs()
    expected = triton_conv.depthwise(x, taps, scale, case.neighbours())
    grad_x = torch.autograd.grad(expected.sum(), x)[0]  # the gradient of a sum has strides of zero
    y, transposed = x.detach().mT.contiguous().mT.requires_grad_(), taps.detach().mT.contiguous().mT
    assert not y.is_contiguous() and not transposed.is_contiguous()
    out = triton_conv.depthwise(y, transposed, scale, case.neighbours())
    assert torch.equal(out, expected)
    assert torch.equal(torch.autograd.grad(out.sum(), y)[0], grad_x)


def test_only_wanted_gradients_are_computed(monkeypatch):
    case = Case(*SMALL[1])
    (x, taps, residual), scale, _ = case.inputs()
    out = triton_conv.depthwise(x, taps.detach(), scale, case.neighbours(), residual)
    with monkeypatch.context() as patch:
        patch.setattr(triton_conv, "_taps_gradient", None)
        torch.autograd.grad(out.sum(), (x, residual))
    out = triton_conv.depthwise(x.detach(), taps, scale, case.neighbours())
    with monkeypatch.context() as patch:
        patch.setattr(triton_conv, "_gather", None)
        torch.autograd.grad(out.sum(), taps)


@pytest.mark.parametrize("case", SMALL)
def test_gradient_of_the_gradient(case):
    """x̄ is linear in the gradient of the output and in the taps: its own gradients are the convolution, and taps'."""
    case = Case(*case)
    (x, taps, direction), scale, grad = case.inputs()
    neighbours, grad = case.neighbours(), grad.requires_grad_()
    grad_x = torch.autograd.grad(triton_conv.depthwise(x, taps, scale, neighbours), x, grad, create_graph=True)[0]
    to_grad, to_taps = torch.autograd.grad(grad_x, (grad, taps), direction.detach())
    out = triton_conv.depthwise(direction, taps, scale, neighbours)
    assert torch.equal(to_grad, out)
    torch.testing.assert_close(to_taps, torch.autograd.grad(out, taps, grad.detach())[0])


def test_residual_of_another_type():
    case = Case(*SMALL[0])
    (x, taps, residual), scale, _ = case.inputs()
    out = triton_conv.depthwise(x.half(), taps, scale, case.neighbours(), residual)
    alone = triton_conv.depthwise(x.half().float(), taps, scale, case.neighbours())
    assert torch.equal(out, (alone + residual).half())
    assert torch.equal(torch.autograd.grad(out.sum(), residual)[0], torch.ones_like(residual))


def test_autocast_leaves_types_alone():
    case = Case(*SMALL[1])
    (x, taps, _), scale, _ = case.inputs()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for dtype in (torch.float32, torch.float16):
            out = triton_conv.depthwise(x.to(dtype), taps, scale, case.neighbours())
            assert out.dtype == dtype
            assert torch.autograd.grad(out.sum(), taps)[0].dtype == torch.float32


@pytest.mark.parametrize("index", [None, torch.zeros(0, 5, dtype=torch.int64, device=DEVICE)])
def test_empty_batch(index):
    points = Points((1, 5), index)
    neighbours = triton_conv.neighbours(points, 0, (3, 3), DEVICE)
    x, taps = torch.zeros(0, 5, 8, device=DEVICE), torch.ones(9, 8, device=DEVICE, requires_grad=True)
    out = triton_conv.depthwise(x, taps, torch.zeros(1, 5, 1, device=DEVICE), neighbours)
    assert out.shape == (0, 5, 8)
    assert torch.equal(torch.autograd.grad(out.sum(), taps)[0], torch.zeros_like(taps))


@pytest.mark.parametrize("case", TINY)
def test_operators_are_registered_properly(case):
    case = Case(*case)
    (x, taps, residual), scale, grad = case.inputs()
    n = case.neighbours()
    tensors = (n.entries, n.counts, n.present, n.corners)
    if n.counts is not None:
        index = case.points.index.to(DEVICE)
        torch.library.opcheck(triton_conv._list.overload, (index, n.size, n.kernel_shape))
    shapes = (n.size, n.kernel_shape)
    torch.library.opcheck(triton_conv._gather.overload, (x, taps, scale, residual, *tensors, *shapes, False))
    torch.library.opcheck(triton_conv._taps_gradient.overload, (x.detach(), grad, scale, *tensors[2:], *shapes))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", TINY)
def test_compiles_into_one_graph(case, dynamic):
    case = Case(*case)
    (x, taps, residual), scale, grad = case.inputs()
    size, index = case.points.size, case.points.index
    index = None if index is None else index.to(DEVICE)

    def convolve(x, taps, scale, residual, index):
        neighbours = triton_conv.neighbours(Points(size, index), x.shape[0], case.kernel_shape, DEVICE)
        return triton_conv.depthwise(x.sin(), taps, scale, neighbours, residual)

    def outputs(function):
        out = function(x, taps, scale, residual, index)
        return out, *torch.autograd.grad(out, (x, taps, residual), grad)

    whole = torch.compile(convolve, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert all(torch.equal(a, b) for a, b in zip(outputs(whole), outputs(convolve)))


def test_nothing_depends_on_data(monkeypatch):
    """Tensors without values refuse to be read; the bodies of the operators work on them, and so do their fakes."""
    for name in ("list_kernel", "gather_kernel", "lattice_kernel", "taps_kernel"):
        monkeypatch.setattr(triton_conv, name, MagicMock())  # launches nothing
    with FakeTensorMode():
        index = torch.zeros(2, 4096, dtype=torch.int64, device=DEVICE)
        n = triton_conv.neighbours(Points((128, 96), index), 2, (7, 5), DEVICE)
        assert n.entries.shape == (2, 35, 4096) and n.entries.dtype == torch.int32
        assert n.counts.shape == n.corners.shape == (2, 4096) and n.present.shape == (2, 134, 100)
        x, taps, scale = (torch.zeros(*s, device=DEVICE) for s in ((2, 4096, 8), (35, 8), (2, 4096, 1)))
        out = triton_conv.depthwise(x.requires_grad_(), taps.requires_grad_(), scale, n)
        assert [g.shape for g in torch.autograd.grad(out.sum(), (x, taps))] == [x.shape, taps.shape]
        triton_conv._list.function(index, n.size, n.kernel_shape)
        tensors = (n.entries, n.counts, n.present, n.corners)
        triton_conv._gather.function(x, taps, scale, None, *tensors, n.size, n.kernel_shape, False)
        triton_conv._taps_gradient.function(x, x, scale, *tensors[2:], n.size, n.kernel_shape)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_captured_step_replays():
    case = Case(*CASES[0])
    expected = case.outputs()
    (x, taps, residual), scale, grad = case.inputs()
    points = Points(case.points.size, case.points.index.to(DEVICE))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_conv.depthwise(
            x, taps, scale, triton_conv.neighbours(points, len(x), case.kernel_shape, DEVICE), residual
        )
        results = (out, *torch.autograd.grad(out, (x, taps, residual), grad))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected))


def test_sizes_beyond_32_bits():
    index = torch.empty(1, 2**26, dtype=torch.int64, device="meta")
    assert triton_conv._entry_format(2**25, 49) == (6, torch.int32)
    assert triton_conv._list(index, (2**13, 2**13), (7, 7))[0].dtype == torch.int64
    with pytest.raises(ValueError, match="fewer than 2"):
        triton_conv.neighbours(Points((2**16, 2**15)), 1, (7, 7), DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 6, 4, dtype=torch.float64)}, "x is torch.float64"),
        ({"x": torch.zeros(2, 5, 4)}, "x is"),
        ({"taps": torch.zeros(9, 5)}, "taps is"),
        ({"taps": torch.zeros(9, 4, dtype=torch.bfloat16)}, "taps is torch.bfloat16"),
        ({"scale": torch.zeros(3, 6, 1)}, "scale is"),
        ({"residual": torch.zeros(2, 6, 4, dtype=torch.float64)}, "residual is torch.float64"),
    ],
)
def test_bad_inputs_are_named(change, message):
    neighbours = triton_conv.neighbours(Points((2, 3)), 2, (3, 3), DEVICE)
    inputs = {"x": torch.zeros(2, 6, 4), "taps": torch.zeros(9, 4), "scale": torch.zeros(1, 6, 1)} | change
    with pytest.raises(ValueError, match=message):
        triton_conv.depthwise(neighbours=neighbours, **inputs)


def test_bad_windows_are_named():
    with pytest.raises(ValueError, match=r"kernel_shape is \(4, 3\)"):
        triton_conv.neighbours(Points((2, 3)), 2, (4, 3), DEVICE)
    with pytest.raises(ValueError, match="accepted: 2, those of the batch"):
        triton_conv.neighbours(Points((2, 3), torch.zeros(1, 2, dtype=torch.int64)), 2, (3, 3), DEVICE)


def test_compiles_for_an_h100_without_spills(tmp_path):
    calls = """
import torch
from diffusion.coordinates import Points
from models.operators.sparse_conv import triton_conv

for channels, dtype in ((64, torch.bfloat16), (64, torch.float32), (24, torch.float16)):
    for index in (None, torch.arange(1024).expand(2, -1)):
        points = Points((64, 64), index)
        neighbours = triton_conv.neighbours(points, 2, (7, 7), None)
        x = torch.zeros(2, points.count, channels, dtype=dtype, requires_grad=True)
        taps, scale = torch.zeros(49, channels, requires_grad=True), torch.zeros(2, points.count, 1)
        triton_conv.depthwise(x, taps, scale, neighbours, x.detach()).sum().backward()
"""
    kernels = compiled(calls, tmp_path)
    assert {kernel.name for kernel in kernels} == {"list_kernel", "gather_kernel", "lattice_kernel", "taps_kernel"}
    assert len(kernels) == 1 + 3 * (2 + 2 + 2)
    for kernel in kernels:
        assert kernel.fits(registers=168), kernel
