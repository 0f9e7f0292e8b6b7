"""The native back end on a CPU: against dense arithmetic in float64, and what happens without a compiler."""

import logging
import os
import stat

import pytest
import torch

from diffusion.coordinates import Points
from models.operators import compiled
from models.operators.dispatch import get_backend
from models.operators.sparse_conv import cpu, pairs
from models.operators.sparse_conv.backend import resampled_shape
from models.operators.sparse_conv.native import NativeBackend
from models.operators.sparse_conv.torch_dense import TorchDenseBackend
from networks import random_points

CPU = torch.device("cpu")
ENGINES = [
    pytest.param(cpu, marks=pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")),
    pairs,
]
CASES = [  # size, training size, k, points, channels
    ((16, 16), (16, 16), 7, 64, 64),
    ((9, 14), (9, 14), 7, 50, 83),
    ((12, 5), (12, 5), 3, 60, 16),
    ((20, 12), (10, 12), 5, 70, 40),
    ((6, 6), (6, 6), 7, 1, 3),
    ((8, 10), (8, 10), 5, None, 20),
]


def draw(size, train_size, k, count, channels, batch=3):
    """Points in no order, features, kernel and residual, float32."""
    points = random_points(batch, size, count)
    x, residual = torch.randn(2, batch, points.count, channels)
    return points, resampled_shape(k, size, train_size), x, torch.randn(channels, 1, k, k), residual


def value_and_gradients(conv, *inputs):
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    out = conv(*inputs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def engine_conv(engine, points, kernel_shape, k, batch):
    """The back end's convolution with an engine of our choice."""
    backend = NativeBackend()
    plan = backend.plan(points, batch, kernel_shape, k, CPU)

    def conv(x, weight, residual):
        taps = torch.nn.functional.interpolate(weight, size=kernel_shape, mode="bilinear").flatten(1).t()
        return engine.depthwise(x, taps, plan.inverse_density, plan.neighbours(engine), residual)

    return conv


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_with_dense_arithmetic_in_float64(engine, case):
    torch.manual_seed(0)
    points, kernel_shape, x, weight, residual = draw(*case)
    dense = TorchDenseBackend()
    plan = dense.plan(points, 3, kernel_shape, case[2], CPU)
    expected = value_and_gradients(
        lambda x, w, r: dense.conv(x, w, plan, case[4], r), x.double(), weight.double(), residual.double()
    )
    found = value_and_gradients(engine_conv(engine, points, kernel_shape, case[2], 3), x, weight, residual)
    for a, b in zip(found, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_is_summed_in_float32(engine, dtype):
    points, kernel_shape, x, weight, _ = draw(*CASES[0])
    x = x.to(dtype)
    conv = engine_conv(engine, points, kernel_shape, 7, 3)
    out = conv(x, weight, None)
    assert out.dtype == dtype
    assert torch.equal(out, conv(x.float(), weight, None).to(dtype))


def test_the_choice_of_an_engine_changes_no_number():
    """Through `get_backend`: full lattices with and without gradients, depthwise and not, float64."""
    native, dense = get_backend("native"), get_backend("torch_dense")
    for case in CASES:
        points, kernel_shape, x, weight, residual = draw(*case)
        channels = case[4]
        full = torch.randn(channels, channels, *weight.shape[2:])
        plans = [backend.plan(points, 3, kernel_shape, case[2], CPU) for backend in (native, dense)]
        for kernel, groups in ((weight, channels), (full, 1)):
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
                inputs = [value.to(dtype) for value in (x, kernel, residual)]
                a, b = (
                    value_and_gradients(lambda x, w, r, b=b, p=p, g=groups: b.conv(x, w, p, g, r), *inputs)
                    for b, p in zip((native, dense), plans)
                )
                with torch.no_grad():
                    a.append(native.conv(*inputs[:2], plans[0], groups))
                    b.append(dense.conv(*inputs[:2], plans[1], groups))
                for found, expected in zip(a, b):
                    scale = expected.abs().max().item()
                    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
def test_results_are_the_same_bits_on_any_number_of_threads():
    points, kernel_shape, x, weight, residual = draw((64, 64), (64, 64), 7, 2500, 24)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(value_and_gradients(engine_conv(cpu, points, kernel_shape, 7, 3), x, weight, residual))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
def test_custom_operators_are_registered_soundly_and_compile_whole():
    points, kernel_shape, x, weight, residual = draw((8, 9), (8, 9), 3, 30, 17)
    made = cpu.neighbours(points, 3, kernel_shape, CPU)
    taps, scale = weight.flatten(1).t().contiguous(), torch.rand(3, 30, 1)
    lists = (made.ends, made.rows, made.taps)
    arguments = (x.requires_grad_(), taps.requires_grad_(), scale, *lists, residual.requires_grad_())
    torch.library.opcheck(torch.ops.infty_diff.depthwise_cpu.default, arguments)

    def conv(x, taps, residual):
        return cpu.depthwise(x, taps, scale, made, residual).sin()

    whole = torch.compile(conv, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradients(whole, x, taps, residual), value_and_gradients(conv, x, taps, residual)):
        assert torch.equal(a, b)


def test_counts_of_the_list_are_window_counts():
    from models.operators.sparse_conv.backend import window_counts

    if compiled.library() is None:
        pytest.skip("needs a C compiler")
    points, kernel_shape, *_ = draw((13, 7), (13, 7), 5, 31, 4)
    counts = cpu.neighbours(points, 3, kernel_shape, CPU).ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    assert torch.equal(counts.view(3, 31), window_counts(points, kernel_shape, CPU))


@pytest.mark.parametrize("name", ["native", "torch_dense"])
def test_unusable_input_is_refused(name):
    backend = get_backend(name)
    index = torch.tensor([[0, 5, 9], [1, 2, 3]])

    def refused(match, points=index, x=None, weight=None, size=(4, 4), batch=2, residual=None, groups=8):
        x = torch.zeros(2, 3, 8) if x is None else x
        weight = torch.zeros(8, 1, 3, 3, requires_grad=True) if weight is None else weight
        with pytest.raises(ValueError, match=match):
            plan = backend.plan(Points(size, points), batch, (3, 3), 3, CPU)
            backend.conv(x, weight, plan, groups, residual)

    refused("M > 0", points=index[:, :0], x=torch.zeros(2, 0, 8))
    refused(r"accepted: torch.int64", points=index.int())
    refused(r"accepted: torch.int64 of shape \(3, M\)", batch=3)
    refused("on meta", points=index.to("meta"))
    refused("x has shape", x=torch.zeros(2, 4, 8))
    refused("x has shape", x=torch.zeros(2, 3, 8, 1))
    refused("weight has shape", weight=torch.zeros(7, 1, 3, 3))
    refused("residual has shape", residual=torch.zeros(2, 3, 7))
    refused("x is on meta", x=torch.zeros(2, 3, 8, device="meta"))
    refused("accepted: floating point", x=torch.zeros(2, 3, 8, dtype=torch.int32))
    refused("accepted: both float64", x=torch.zeros(2, 3, 8, dtype=torch.float64))


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("ids", "match"), [([0, 5, 16], "outside the lattice"), ([0, -1, 3], "outside"), ([3, 0, 3], "repeats a pixel")]
)
def test_ids_are_checked_where_they_index_memory(ids, match):
    points = Points((4, 4), torch.tensor([[0, 1, 2], ids]))
    with pytest.raises(ValueError, match=match):
        cpu.neighbours(points, 2, (3, 3), CPU)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """A cache of libraries that is empty, and the knowledge of the one in use put back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    yield tmp_path
    compiled.library.cache_clear()


def script(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("broken", ["missing", "silent", "failing", "garbage"])
def test_without_a_working_compiler_a_slower_form_takes_over(broken, fresh_build, monkeypatch, caplog):
    texts = {
        "silent": "exit 0\n",  # claims success and writes nothing
        "failing": "echo 'internal compiler error' >&2; exit 1\n",
        "garbage": 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"\n',
    }
    compiler = "/nowhere/cc" if broken == "missing" else script(fresh_build / "cc", texts[broken])
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert compiled.library() is None
    assert "using slower ones" in caplog.text
    test_the_choice_of_an_engine_changes_no_number()


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
def test_a_compiler_without_openmp_will_do(fresh_build, monkeypatch):
    real = os.environ.get("CC", "cc")
    monkeypatch.setenv("CC", script(fresh_build / "cc", f'case "$*" in *-fopenmp*) exit 1;; esac; exec {real} "$@"\n'))
    assert compiled.library() is not None
    assert len(list((fresh_build / "infty-diff").iterdir())) == 1  # the library, and nothing half-written
    test_engines_agree_with_dense_arithmetic_in_float64(cpu, CASES[1])
