"""Back ends on other libraries against `torch_dense`: the libraries where installed, stand-ins for them everywhere."""

import copy
import sys

import pytest
import torch

import sparse_libraries as stand_ins
import test_sparse_conv
from diffusion.coordinates import Points
from models.operators.dispatch import get_backend, use_backend
from models.operators.sparse_conv.backend import resampled_shape
from models.operators.sparse_conv.library import LibraryBackend, check_conventions
from models.sparse_block import SparseBlock
from test_sparse_conv import one_rounding

CPU = torch.device("cpu")
LIBRARIES = ("torchsparse", "spconv")
STAND_INS = {
    "torchsparse 2.0": ("torchsparse", lambda: stand_ins.torchsparse_2_0(fork=False)),
    "torchsparse 2.0, fork": ("torchsparse", lambda: stand_ins.torchsparse_2_0(fork=True)),
    "torchsparse 2.1": ("torchsparse", stand_ins.torchsparse_2_1),
    "spconv": ("spconv", lambda: stand_ins.spconv_2_3(cpu_only=False)),
}
DEPTHWISE = {"torchsparse 2.0, fork"}
CASES = (*test_sparse_conv.CASES, ((5, 4), (5, 4), 1, 7))


@pytest.fixture
def install(monkeypatch):
    """Put a stand-in in place of its library, its device being this CPU."""

    def install(modules: dict) -> None:
        top = {name.split(".")[0] for name in modules}
        for name in [name for name in sys.modules if name.split(".")[0] in top]:
            monkeypatch.delitem(sys.modules, name)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(LibraryBackend, "require_cuda", classmethod(lambda cls: "cpu"))

    check_conventions.cache_clear()
    yield install
    check_conventions.cache_clear()


@pytest.fixture(params=STAND_INS)
def stand_in(request, install) -> tuple[str, LibraryBackend]:
    name, make = STAND_INS[request.param]
    install(make())
    return request.param, get_backend(name)


def both(backend, device, case, groups, c_out, *, gradients=True, dtype=torch.float32):
    """Result and gradients of x, weight and residual by a back end, and by `torch_dense` on the CPU."""
    size, train_size, kernel_size, count = case
    generator = torch.Generator().manual_seed(1)
    batch, channels, total = 2, 6, size[0] * size[1]
    index = None
    if count is not None:
        index = torch.stack([torch.randperm(total, generator=generator)[:count] for _ in range(batch)])
    kernel_shape = resampled_shape(kernel_size, size, train_size)
    shapes = [
        (batch, count or total, channels),
        (c_out, channels // groups, kernel_size, kernel_size),
        (batch, count or total, c_out),
    ]
    x, weight, residual = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    dout = torch.randn(shapes[2], generator=generator, dtype=dtype)
    results = []
    for who, where in ((backend, device), (get_backend("torch_dense"), CPU)):
        inputs = [tensor.to(where, copy=True).requires_grad_(gradients) for tensor in (x, weight, residual)]
        points = Points(size, None if index is None else index.to(where))
        plan = who.plan(points, batch, kernel_shape, kernel_size, where)
        out = None
        for _ in range(2):  # the second call finds the neighbours where the first left them
            out = who.conv(inputs[0], inputs[1], plan, groups, residual=inputs[2])
        grads = torch.autograd.grad(out, inputs, dout.to(where)) if gradients else ()
        results.append([tensor.detach().cpu() for tensor in (out, *grads)])
    return results


def assert_equal(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_installed_libraries_agree_with_torch_dense(name, case):
    try:
        backend = get_backend(name)
    except ValueError as error:
        pytest.skip(str(error))
    device = torch.empty(0, device=backend.device_type).device  # with its number
    tolerance = 1e-2 if device.type == "cuda" else 1e-5  # TF32
    for groups, c_out in ((1, 4), (6, 6)) if backend.depthwise else ((1, 4),):
        assert_equal(*both(backend, device, case, groups, c_out, gradients=backend.gradients), tolerance)


@pytest.mark.parametrize("case", CASES)
def test_conventions_are_translated(stand_in, case):
    which, backend = stand_in
    assert backend.depthwise == (which in DEPTHWISE)
    assert_equal(*both(backend, CPU, case, 1, 4), 1e-5)
    if backend.depthwise:
        assert_equal(*both(backend, CPU, case, 6, 6), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_density_is_not_rounded_in_half_precision(stand_in, dtype):
    one_rounding(stand_in[1], dtype)
    one_rounding(stand_in[1], dtype, autocast=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_return_their_own_type(stand_in, dtype):
    found, expected = both(stand_in[1], CPU, CASES[0], 1, 4, dtype=dtype)
    assert_equal(found, expected, 1e-5 if dtype == torch.float64 else 3e-2)


def test_autocast_gives_what_torch_dense_gives(stand_in):
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = both(stand_in[1], CPU, CASES[0], 1, 4)
    assert_equal(found, expected, 3e-2)


def test_neighbours_found_without_gradients_serve_with_them(stand_in):
    _, backend = stand_in
    points = Points((4, 5), torch.tensor([[3, 17, 8, 2], [19, 0, 1, 5]]))
    plan = backend.plan(points, 2, (3, 3), 3, CPU)
    x, weight = torch.randn(2, 4, 3), torch.randn(3, 3, 3, 3, requires_grad=True)
    with torch.no_grad():
        first = backend.conv(x, weight, plan, 1)
    x.requires_grad_()
    second = backend.conv(x, weight, plan, 1)
    assert torch.equal(first, second)
    assert all(bool(g.abs().sum() > 0) for g in torch.autograd.grad(second.sum(), (x, weight)))


def test_a_block_trains_and_is_copied_with_its_back_end(stand_in):
    which, backend = stand_in
    block = use_backend(SparseBlock(4, 3, depthwise=which in DEPTHWISE), backend)
    twin = copy.deepcopy(block)
    plan = backend.plan(Points((4, 5)), 2, (3, 3), 3, CPU)
    x = torch.randn(2, 20, 4)
    out = block(x, plan)
    assert torch.equal(out, twin(x, plan))
    out.sum().backward()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize("order", [{"image_column": 3}, {"first_fastest": False}], ids=["columns", "taps"])
def test_a_wrong_order_is_found_at_construction(install, order):
    install(stand_ins.torchsparse_2_1(**order))
    with pytest.raises(ValueError, match=r"model\.backend is 'torchsparse'.*order of its coordinates or taps"):
        get_backend("torchsparse")


def test_conventions_are_checked_where_networks_are_built_without_memory(stand_in):
    check_conventions.cache_clear()
    with torch.device("meta"):
        assert get_backend(stand_in[1].name) == stand_in[1]


def test_a_library_that_fails_is_named(install):
    modules = stand_ins.spconv_2_3(cpu_only=False)
    del modules["spconv.pytorch"].ops.get_indice_pairs
    install(modules)
    with pytest.raises(ValueError, match=r"'spconv', which failed on a small example: AttributeError: .*indice_pairs"):
        get_backend("spconv")


def test_conventions_are_checked_once(install, monkeypatch):
    modules = stand_ins.spconv_2_3(cpu_only=False)
    install(modules)
    get_backend("spconv")
    monkeypatch.delattr(modules["spconv.pytorch"].ops, "get_indice_pairs")
    get_backend("spconv")


@pytest.mark.parametrize("name", LIBRARIES)
def test_missing_libraries_say_how_to_get_them(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"model\.backend is '{name}', which is not installed: .*({name})"):
        get_backend(name)


@pytest.mark.parametrize("name", LIBRARIES)
def test_without_a_gpu_the_line_says_so(name, install, monkeypatch):
    known = LibraryBackend.__dict__["require_cuda"]
    install(next(make for key, make in STAND_INS.values() if key == name)())
    monkeypatch.setattr(LibraryBackend, "require_cuda", known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=rf"'{name}', which computes on CUDA only"):
        get_backend(name)


def test_what_a_library_cannot_do_is_refused(install):
    install(stand_ins.torchsparse_2_1())
    backend = get_backend("torchsparse")
    with pytest.raises(ValueError, match=r"run\.device is meta; accepted: cpu, where model\.backend=torchsparse"):
        backend.plan(Points((3, 3)), 1, (3, 3), 3, torch.device("meta"))
    plan, x = backend.plan(Points((3, 3)), 1, (3, 3), 3, CPU), torch.randn(1, 9, 4)
    with pytest.raises(ValueError, match=r"model\.depthwise_sparse is True; accepted: False .*torchsparse"):
        use_backend(SparseBlock(4, 3), backend)
    with pytest.raises(ValueError, match=r"groups is 4; accepted: 1, as model\.backend=torchsparse"):
        backend.conv(x, torch.randn(4, 1, 3, 3), plan, 4)
    with pytest.raises(ValueError, match="groups is 2, of 4 channels"):
        backend.conv(x, torch.randn(4, 2, 3, 3), plan, 2)


def test_the_cpu_wheel_of_spconv_has_no_gradients(install):
    install(stand_ins.spconv_2_3(cpu_only=True))
    backend = get_backend("spconv")
    plan, x = backend.plan(Points((3, 3)), 1, (3, 3), 3, CPU), torch.randn(1, 9, 4)
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    with torch.no_grad():
        assert backend.conv(x, weight, plan, 1).shape == (1, 9, 4)
    with pytest.raises(ValueError, match="without gradients; accepted: native"):
        backend.conv(x, weight, plan, 1)
