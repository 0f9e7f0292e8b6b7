"""Which engine of the native back end computes what, and that its lists stay within bounds."""

from dataclasses import replace

import pytest
import torch

from diffusion.coordinates import Points
from fake_gpu import can_pretend
from models.operators import compiled, dispatch
from models.operators.sparse_conv import backend as base
from models.operators.sparse_conv import cpu, enlarged, native, pairs
from models.operators.sparse_conv.backend import resampled_shape
from models.operators.sparse_conv.native import NativeBackend
from models.operators.sparse_conv.torch_dense import TorchDenseBackend
from networks import random_points

CPU = torch.device("cpu")
SIZE, CHANNELS = (24, 20), 16


def chosen(ratio, size=SIZE, train_size=SIZE, k=7, device="cpu", wants=(True, True), dtype=torch.float32, groups=None):
    """The engine for part of a lattice; wants: which of features and kernel take gradients."""
    count = int(size[0] * size[1] * ratio)
    index = None if ratio == 1 else torch.arange(count, device=device).expand(2, -1)
    points, kernel_shape = Points(size, index), resampled_shape(k, size, train_size)
    plan = NativeBackend().plan(points, 2, kernel_shape, k, torch.device(device))
    x = torch.empty(2, count, CHANNELS, device=device, dtype=dtype, requires_grad=wants[0])
    groups = groups or CHANNELS
    weight = torch.empty(CHANNELS, CHANNELS // groups, k, k, device=device, requires_grad=wants[1])
    return native._engine(x, weight, plan, groups)


@can_pretend
def test_engines_on_a_gpu(fake_gpu, monkeypatch):
    triton_conv = pytest.importorskip("models.operators.sparse_conv.triton_conv")
    monkeypatch.setattr(dispatch, "kernels", lambda operation, kind: triton_conv if kind == "cuda" else None)
    with fake_gpu():
        for size in (SIZE, (256, 256)):
            both = {"size": size, "train_size": size, "device": "cuda:0", "dtype": torch.bfloat16}
            assert chosen(1, **both) is triton_conv  # the gradient of a depthwise kernel is slow in cuDNN
            assert chosen(1, **both, wants=(False, True)) is triton_conv
            assert chosen(1, **both, wants=(False, False)) is None  # the forward pass is not
            assert chosen(1, **both, wants=(True, False)) is None
            with torch.no_grad():
                assert chosen(1, **both) is None
            assert [chosen(ratio, **both) for ratio in (1 / 8, 1 / 2, 0.6)] == [triton_conv, triton_conv, None]
            assert chosen(1, **both, groups=1) is chosen(1 / 4, **both, groups=1) is None  # matrix products
        large = {"size": (1024, 1024), "train_size": (256, 256), "device": "cuda:0", "dtype": torch.bfloat16}
        assert chosen(1, **large, wants=(False, False)) is enlarged
        assert chosen(1, **large) is triton_conv
        # 841 taps at a quarter of the pixels of two images: 1.8 GB of entries.
        assert chosen(1 / 4, **large, wants=(False, False)) is enlarged
        assert chosen(1 / 4, **large) is None
        assert chosen(1 / 16, **large) is triton_conv


@can_pretend
def test_the_lattice_kernel_is_called_without_a_list(fake_gpu, monkeypatch):
    triton_conv = pytest.importorskip("models.operators.sparse_conv.triton_conv")
    monkeypatch.setattr(dispatch, "kernels", lambda operation, kind: triton_conv if kind == "cuda" else None)
    calls, depthwise = [], triton_conv.depthwise
    monkeypatch.setattr(triton_conv, "depthwise", lambda *given: calls.append(given[3]) or depthwise(*given))
    with fake_gpu():
        backend, x = NativeBackend(), torch.empty(2, 480, CHANNELS, device="cuda", dtype=torch.bfloat16)
        plan = backend.plan(Points(SIZE), 2, (7, 7), 7, x.device)
        kernel = torch.nn.Parameter(torch.empty(CHANNELS, 1, 7, 7, device="cuda"))
        assert backend.conv(x, kernel, plan, CHANNELS).shape == x.shape
    assert len(calls) == 1 and calls[0].counts is None


@can_pretend
def test_a_device_without_a_number_is_any_of_its_kind(fake_gpu):
    with fake_gpu():
        points = Points(SIZE, torch.zeros(2, 9, dtype=torch.int64, device="cuda:0"))
        for name in ("cuda", "cuda:0"):
            base.check_points(points, 2, torch.device(name))
        for name in ("cuda:1", "cpu"):
            with pytest.raises(ValueError, match=f"on cuda:0; accepted: {name}"):
                base.check_points(points, 2, torch.device(name))


def test_lists_take_the_bytes_they_are_said_to():
    points = random_points(3, (40, 32), 500)
    for engine, fields in ((cpu, ("rows", "taps")), (pairs, None)):
        if engine is cpu and compiled.library() is None:
            continue
        made = engine.neighbours(points, 3, (5, 3), CPU)
        tensors = [t for pair in made.pairs for t in pair] if fields is None else [getattr(made, f) for f in fields]
        actual = sum(t.nbytes for t in tensors)
        assert 0.85 * actual < engine.list_bytes(points, 3, (5, 3)) < 1.15 * actual
    triton_conv = pytest.importorskip("models.operators.sparse_conv.triton_conv")
    entries = triton_conv._list_shapes(points.index, points.size, (5, 3))[0]
    assert triton_conv.list_bytes(points, 3, (5, 3)) == entries.nbytes
    assert triton_conv.list_bytes(Points((40, 32)), 3, (5, 3)) == 0


@pytest.mark.parametrize("count", [None, 330])
@pytest.mark.parametrize("kernel_gradient", [True, False])
def test_beyond_the_bound_the_lattice_is_computed(monkeypatch, count, kernel_gradient):
    """The same numbers, and no list."""
    monkeypatch.setattr(native, "_LIST_BYTES", 1000)
    for engine in (cpu, pairs):
        monkeypatch.setattr(engine, "neighbours", lambda *_: pytest.fail("a list was made"))
    torch.manual_seed(0)
    points, kernel_shape = random_points(2, (30, 20), count), resampled_shape(5, (30, 20), (10, 10))
    x, residual = torch.randn(2, 2, points.count, CHANNELS, dtype=torch.float32)
    kernel = torch.randn(CHANNELS, 1, 5, 5)
    results = []
    for backend, dtype in ((NativeBackend(), torch.float32), (TorchDenseBackend(), torch.float64)):
        plan = backend.plan(points, 2, kernel_shape, 5, CPU)
        inputs = [t.to(dtype).requires_grad_() for t in (x, residual)]
        weight = kernel.to(dtype).requires_grad_(kernel_gradient)
        out = backend.conv(inputs[0], weight, plan, CHANNELS, inputs[1])
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, weight][: 2 + kernel_gradient])])
    for found, expected in zip(*results):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_every_engine_gives_the_same_numbers():
    """Those that a benchmark times beside the one that is chosen."""
    torch.manual_seed(0)
    backend, dense = NativeBackend(), TorchDenseBackend()
    for ratio, size, k in ((1, (12, 9), 3), (0.3, (12, 9), 3), (1, (20, 30), 5), (0.5, (20, 30), 5)):
        count = None if ratio == 1 else int(ratio * size[0] * size[1])
        points, kernel_shape = random_points(2, size, count), resampled_shape(k, size, (10, 10))
        x, kernel = torch.randn(2, points.count, CHANNELS), torch.randn(CHANNELS, 1, k, k)
        plan = backend.plan(points, 2, kernel_shape, k, CPU)
        expected = dense.conv(x.double(), kernel.double(), dense.plan(points, 2, kernel_shape, k, CPU), CHANNELS)
        with torch.no_grad():
            possible = native.engines(x, kernel, plan, CHANNELS)
        assert {"dense", "pairs"} <= possible.keys()
        for engine in possible.values():
            with torch.no_grad():
                found = backend.conv_by(engine, x, kernel, plan, CHANNELS)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("kernel_shape", "span"), [((7, 7), None), ((5, 9), None), ((9, 9), (8.0, 7.5))], ids=str)
def test_windows_are_counted_once(monkeypatch, kernel_shape, span):
    """By the list where there is one; where taps count in part, their area is no such count."""
    if compiled.library() is None:
        pytest.skip("needs a C compiler")
    counted, count = [], base.window_counts
    monkeypatch.setattr(base, "window_counts", lambda *given: counted.append(1) or count(*given))
    torch.manual_seed(0)
    points = random_points(2, SIZE, 90)
    backend, x, kernel = NativeBackend(), torch.randn(2, 90, CHANNELS), torch.randn(CHANNELS, 1, 7, 7)
    plan = backend.plan(points, 2, kernel_shape, 7, CPU, span)
    first = backend.conv(x, kernel, plan, CHANNELS)
    assert torch.equal(backend.conv(x, kernel, plan, CHANNELS), first)
    assert not counted
    assert torch.equal(plan.inverse_density, base.inverse_density(points, kernel_shape, 7, CPU, span))
    assert torch.equal(replace(plan, lattice=(9, 9)).inverse_density, plan.inverse_density)
