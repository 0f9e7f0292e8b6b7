"""Fused normalisation, modulation and MLP against float64 formulas, interpreted where there is no GPU."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.grid_unet import GridBlock
from models.modulation import Conditioning, Modulation
from models.operators import dispatch
from models.operators.pointwise import norm_mlp as pointwise
from triton_aot import compiled

pytest.importorskip("triton")
triton_pointwise = pytest.importorskip("models.operators.pointwise.triton_norm_mlp")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Images, rows of an image, channels: tiles are cut short, single, many per program, and of a width no power of 2.
SHAPES = [(2, 37, 64), (1, 1, 16), (3, 70, 32), (1, 130, 16), (2, 5, 24), (1, 6, 1024)]
MLP_SHAPES = [(2, 37, 64), (1, 1, 16), (3, 70, 32), (1, 130, 16), (1, 1, 64)]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = F32) -> list[torch.Tensor]:
    """x, a, b, w1, b1, w2, b2 for (B, M, C); x of type `dtype`, off centre."""
    torch.manual_seed(0)
    batch, _, c = shape
    shapes = [shape, (batch, c), (batch, c), (2 * c, c), (2 * c,), (c, 2 * c), (c,)]
    x, *others = (torch.randn(s, device=DEVICE) / (1 if s[-1] < 2 or len(s) != 2 else s[-1] ** 0.5) for s in shapes)
    return [tensor.requires_grad_() for tensor in ((3 * x + 1).to(dtype), *others)]


def by_definition(x, a, b, w1=None, b1=None, w2=None, b2=None):
    h = F.layer_norm(x, x.shape[-1:])
    h = h * a.unsqueeze(-2) + b.unsqueeze(-2)
    return h if w1 is None else x + F.linear(F.gelu(F.linear(h, w1, b1)), w2, b2)


def with_gradients(function, tensors, dout=None):
    """The output, and the gradients of all tensors for a random gradient of the output."""
    out = function(*tensors)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, device=DEVICE).to(out.dtype) if dout is None else dout
    wanted = [tensor for tensor in tensors if tensor is not None]
    return [out, *torch.autograd.grad(out, wanted, dout)], dout


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-6)).item()


def check(function, tensors, tolerance: float, **options) -> None:
    """Outputs and gradients of a function of the module agree with the formula in float64, and types are kept."""
    actual, dout = with_gradients(lambda *t: function(*t, **options), tensors)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    expected, _ = with_gradients(by_definition, exact, dout.double())
    assert [t.dtype for t in actual[1:]] == [t.dtype for t in tensors if t is not None]
    errors = [relative_error(a, b) for a, b in zip(actual, expected)]
    assert max(errors) < tolerance, errors


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_modulation(shape):
    check(triton_pointwise.norm_modulate, inputs(shape)[:3], 2e-6)


@pytest.mark.parametrize("shape", SHAPES[2:5])
def test_vectors_for_all_images(shape):
    x, a, b, *weights = inputs(shape)
    tensors = [x, *(vector[0].detach().requires_grad_() for vector in (a, b))]
    check(triton_pointwise.norm_modulate, tensors, 2e-6)
    if triton_pointwise.supports_mlp(x, F32):
        check(triton_pointwise.norm_modulate_mlp, [*tensors, *weights], 2e-6)


@pytest.mark.parametrize("shape", MLP_SHAPES)
def test_norm_modulation_and_mlp(shape):
    check(triton_pointwise.norm_modulate_mlp, inputs(shape), 2e-6)


@pytest.mark.parametrize(
    ("channels", "dtype", "factors"),
    [(16, BF16, BF16), (32, F16, F16), (64, BF16, BF16), (64, F16, F16), (64, F32, BF16), (128, F32, F16)],
)
def test_half_precision(channels, dtype, factors):
    tensors = inputs((2, 37, channels), dtype)
    tolerance = {F16: 2e-3, BF16: 1e-2 if DEVICE.type == "cuda" else 2e-2}[factors]  # interpreted, bfloat16 is cut off
    check(triton_pointwise.norm_modulate, tensors[:3], tolerance, dtype=factors)
    check(triton_pointwise.norm_modulate_mlp, tensors, tolerance, dtype=factors)
    assert triton_pointwise.norm_modulate(*tensors[:3], dtype=factors).dtype == factors


def test_features_far_from_zero():
    """Statistics of rows whose mean is a thousand times their spread."""
    x, *others = inputs((2, 9, 32))[:3]
    check(triton_pointwise.norm_modulate, [(1000 + x / 3).detach().requires_grad_(), *others], 1e-3)


def test_features_in_other_memory_orders():
    x, *others = inputs((2, 12, 16))
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for function, count in ((triton_pointwise.norm_modulate, 2), (triton_pointwise.norm_modulate_mlp, 6)):
        plain, dout = with_gradients(function, [x, *others[:count]])
        strided, _ = with_gradients(function, [turned, *others[:count]], dout.transpose(1, 2).clone().transpose(1, 2))
        assert all(torch.equal(a, b) for a, b in zip(plain, strided))


def test_gradients_are_the_same_to_the_last_bit():
    tensors = inputs((2, 150, 64))
    for function, count in ((triton_pointwise.norm_modulate, 3), (triton_pointwise.norm_modulate_mlp, 7)):
        first, dout = with_gradients(function, tensors[:count])
        second, _ = with_gradients(function, tensors[:count], dout)
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_many_images_and_many_groups_per_image(monkeypatch):
    """More images than programs, and several tiles for a program: each sum is still complete."""
    for programs in (1, 6):
        for name in ("_NORM_PROGRAMS", "_FORWARD_PROGRAMS", "_BACKWARD_PROGRAMS"):
            monkeypatch.setattr(triton_pointwise, name, programs)
        check(triton_pointwise.norm_modulate, inputs((2, 600, 16))[:3], 2e-6)
        check(triton_pointwise.norm_modulate_mlp, inputs((2, 150, 16)), 2e-6)


def test_operators_pass_the_checks_of_pytorch():
    x, a, b, *_ = (t.detach().requires_grad_() for t in inputs((2, 5, 16)))
    for vectors in ((a, b), (a.detach()[0].requires_grad_(), b.detach()[0].requires_grad_())):
        torch.library.opcheck(torch.ops.infty_diff.norm_affine.default, (x, *vectors, 1e-5, BF16))
    *_, w1, b1, w2, b2 = inputs((2, 5, 16))
    w1, b1 = (t.detach().expand(2, *t.shape).contiguous().requires_grad_() for t in (w1, b1))
    torch.library.opcheck(torch.ops.infty_diff.norm_mlp.default, (x, w1, b1, w2, b2, 1e-5, F32))


def test_what_is_taken():
    def features(channels, dtype=F32, rows=3):
        return torch.zeros(2, rows, channels, dtype=dtype, device=DEVICE)

    assert all(triton_pointwise.supports(features(c)) for c in (1, 24, 4096))
    for x in (features(4097), features(8, torch.float64), features(8, rows=0), features(8)[0]):
        assert not triton_pointwise.supports(x)
    assert all(triton_pointwise.supports_mlp(features(c), F32) for c in (16, 32, 64))
    for channels, dtype, factors in ((24, F32, F32), (128, F32, F32), (16, BF16, F16), (16, torch.float64, F16)):
        assert not triton_pointwise.supports_mlp(features(channels, dtype), factors)


@pytest.fixture
def fused_everywhere(monkeypatch):
    """The dispatch takes the kernels on this device too; a list of those it took."""
    calls = []

    def recorded(name):
        kernel = getattr(triton_pointwise, name)

        def record(*arguments):
            calls.append(name)
            return kernel(*arguments)

        return record

    monkeypatch.setattr(dispatch, "kernels", lambda *_: triton_pointwise)
    for name in ("norm_modulate", "norm_modulate_mlp"):
        monkeypatch.setattr(triton_pointwise, name, recorded(name))
    return calls


def block(channels: int) -> tuple[nn.LayerNorm, Modulation, nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
    modules = (module.to(DEVICE) for module in (nn.LayerNorm(channels), Modulation(channels, 6, 5), mlp))
    return *modules, torch.randn(2, 6, device=DEVICE), torch.randn(2, 5, device=DEVICE)


@pytest.mark.parametrize("channels", [16, 24])
def test_dispatch_gives_the_same_either_way(channels, fused_everywhere, monkeypatch):
    norm, modulation, mlp, e, z = block(channels)
    x = torch.randn(2, 11, channels, device=DEVICE, requires_grad=True)

    def outputs():
        affine = Conditioning([(norm, modulation)], z)(e)[0]
        out = pointwise.norm_modulate_mlp(x, norm, affine, mlp)
        out = pointwise.norm_modulate(pointwise.norm_modulate(out, norm), norm, affine)
        parameters = [x, *norm.parameters(), *modulation.parameters(), *mlp.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), parameters)]

    fused = outputs()
    assert len(fused_everywhere) == 3
    monkeypatch.setattr(dispatch, "kernels", lambda *_: None)
    assert all(relative_error(a, b.double()) < 1e-5 for a, b in zip(fused, outputs()))
    assert len(fused_everywhere) == 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_dispatch_compiles_whole(dynamic, fused_everywhere):
    norm, modulation, mlp, e, z = block(16)

    def chain(x):
        affine = Conditioning([(norm, modulation)], z)(e)[0]
        return pointwise.norm_modulate_mlp(pointwise.norm_modulate(x, norm, affine), norm, affine, mlp)

    whole = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    x = torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    for autocast in (False, True):
        with torch.autocast(DEVICE.type, BF16, enabled=autocast):
            eager, dout = with_gradients(chain, [x])
            compiled_whole, _ = with_gradients(whole, [x], dout)
            tolerance = 2e-2 if autocast else 1e-5
            assert all(relative_error(a, b.double()) < tolerance for a, b in zip(compiled_whole, eager))
    assert fused_everywhere.count("norm_modulate") == 2 < fused_everywhere.count("norm_modulate_mlp")


def test_grid_blocks_are_fused_too(fused_everywhere, monkeypatch):
    torch.manual_seed(0)
    grid_block, x = GridBlock(4, 8, 6, 5, dropout=0.0).to(DEVICE), torch.randn(2, 5, 3, 4, device=DEVICE)
    e, z = torch.randn(2, 6, device=DEVICE), torch.randn(2, 5, device=DEVICE)
    affine = Conditioning(grid_block.modulated, z)(e)[0]
    fused = grid_block(x, affine)
    assert len(fused_everywhere) == 2
    monkeypatch.setattr(dispatch, "kernels", lambda *_: None)
    torch.testing.assert_close(fused, grid_block(x, affine))


def test_autocast_decides_on_the_type(fused_everywhere):
    norm, modulation, mlp, e, z = block(16)
    x = torch.randn(2, 11, 16, device=DEVICE)
    with torch.autocast(DEVICE.type, BF16):
        affine = Conditioning([(norm, modulation)], z)(e)[0]
        assert pointwise.norm_modulate(x, norm, affine).dtype == BF16
        out = pointwise.norm_modulate_mlp(x, norm, affine, mlp)
    assert out.dtype == F32 and len(fused_everywhere) == 2
    exact = pointwise.norm_modulate_mlp(x, norm, Conditioning([(norm, modulation)], z)(e)[0], mlp)
    assert 1e-5 < relative_error(out, exact.double()) < 1e-2


LAUNCHES = """
import torch
from models.operators.pointwise import triton_norm_mlp as triton_pointwise, triton_kernels as kernels

compiles, limit = JITFunction.run, 0
def within_limit(self, *args, **kwargs):
    kernel = compiles(self, *args, **kwargs)
    assert kernel.metadata.shared <= limit or "norm" in kernel.metadata.name, (args[-2:], kernel.metadata.shared)
JITFunction.run = within_limit

def both_ways(function, channels, features, *others):
    x = torch.ones(2, 48, channels, dtype=features, requires_grad=True)
    function(x, torch.ones(channels), torch.ones(channels), *others).sum().backward()

for channels in (64, 1024):
    both_ways(triton_pointwise.norm_modulate, channels, torch.bfloat16)
types = {kind: types for types, kind in kernels.KINDS.items()}
for (c, kind), tile in kernels.TILES.items():
    limit, (features, factors) = tile.shared, types[kind]
    weights = (torch.ones(2 * c, c), torch.ones(2 * c), torch.ones(c, 2 * c), torch.ones(c))
    both_ways(triton_pointwise.norm_modulate_mlp, c, features, *weights, 1e-5, factors)
"""


def test_no_register_spills_at_the_tiles_that_ship(tmp_path):
    kernels = compiled(LAUNCHES, tmp_path)
    tiles = triton_pointwise.kernels.TILES
    apart = sum(tile.chunk < 2 * channels for (channels, _), tile in tiles.items())  # backward in two launches
    names = [kernel.name for kernel in kernels]
    assert names.count("norm_forward") == names.count("norm_backward") == 2
    assert names.count("mlp_forward") == len(tiles) and names.count("mlp_backward") == len(tiles) + apart
    assert all(kernel.fits() for kernel in kernels), kernels
