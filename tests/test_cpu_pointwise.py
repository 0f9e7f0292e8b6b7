"""Norm, modulation and MLP in C, against their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F

from models.operators.native import compiled, cpu_pointwise

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
EPS = 1e-5


def formula(x, gamma, beta, scale, shift, *mlp):
    h = F.layer_norm(x, x.shape[2:], gamma, beta, eps=EPS) * scale[:, None] + shift[:, None]
    if not mlp:
        return h
    w1, b1, w2, b2 = mlp
    return x + F.linear(F.gelu(F.linear(h, w1, b1)), w2, b2)


def fused(x, *parameters):
    call = cpu_pointwise.norm_modulate_mlp if len(parameters) > 4 else cpu_pointwise.norm_modulate
    return call(x, *parameters, EPS, torch.float32)


def inputs(batch, points, channels, with_mlp):
    tensors = [torch.randn(batch, points, channels) * 3 + 1, torch.randn(channels), torch.randn(channels)]
    tensors += [torch.randn(batch, channels), torch.randn(batch, channels)]
    if with_mlp:
        w1, w2 = torch.randn(2 * channels, channels), torch.randn(channels, 2 * channels)
        tensors += [w1 / channels**0.5, torch.randn(2 * channels), w2 / channels**0.5, torch.randn(channels)]
    return tensors


def value_and_gradients(function, tensors):
    tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@pytest.mark.parametrize("with_mlp", [False, True])
@pytest.mark.parametrize(
    ("batch", "points", "channels"), [(2, 101, 16), (1, 1, 128), (3, 50, 80), (2, 1200, 64), (70, 3, 48)]
)
def test_fused_is_the_formula(batch, points, channels, with_mlp):
    torch.manual_seed(0)
    tensors = inputs(batch, points, channels, with_mlp)
    found = value_and_gradients(fused, tensors)
    expected = value_and_gradients(formula, [tensor.double() for tensor in tensors])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6 * max(b.abs().max().item(), 1e-3))


def test_the_activation_is_gelu_over_its_whole_range():
    """Through the kernel: with W1 = 0 the hidden units are b1, and W2 reads one of them into each channel."""
    values = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30])])
    channels, x = 128, torch.zeros(1, 1, 128)
    read = torch.eye(channels, 2 * channels)
    found = []
    for part in values.split(channels):
        b1 = F.pad(part, (0, 2 * channels - len(part)))
        none = (torch.zeros(channels), torch.zeros(channels), None, None)
        out = fused(x, *none, torch.zeros(2 * channels, channels), b1, read, torch.zeros(channels))
        found.append(out.flatten()[: len(part)])
    expected = F.gelu(values.double())
    torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-6, atol=1e-7)


def test_gradients_are_the_same_bits_on_any_number_of_threads():
    tensors = inputs(2, 1500, 32, True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append(value_and_gradients(fused, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_constant_row_has_no_variance_and_stays_finite():
    tensors = inputs(1, 4, 16, True)
    tensors[0] = torch.full((1, 4, 16), 7.5)
    for a, b in zip(value_and_gradients(fused, tensors), value_and_gradients(formula, [t.double() for t in tensors])):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * max(b.abs().max().item(), 1e-3))


@pytest.mark.parametrize("with_mlp", [False, True])
def test_custom_operators_are_registered_soundly_and_compile_whole(with_mlp):
    tensors = [tensor.requires_grad_() for tensor in inputs(2, 10, 16, with_mlp)]
    x, _, _, scale, shift, *mlp = tensors
    operator = torch.ops.infty_diff.mlp_cpu if with_mlp else torch.ops.infty_diff.norm_affine_cpu
    torch.library.opcheck(operator.default, (x, scale, shift, *mlp, EPS))
    whole = torch.compile(lambda *a: fused(*a).sin(), fullgraph=True, backend="aot_eager")
    plain = value_and_gradients(lambda *a: fused(*a).sin(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(whole, tensors), plain))


def test_what_the_kernels_take():
    assert cpu_pointwise.supports(torch.zeros(2, 3, 64))
    for shape in ((2, 3, 24), (2, 3, 144), (2, 0, 64)):
        assert not cpu_pointwise.supports(torch.zeros(shape))
    assert not cpu_pointwise.supports(torch.zeros(2, 3, 64, dtype=torch.float64))
    assert not cpu_pointwise.supports_mlp(torch.zeros(2, 3, 64), torch.bfloat16)


@torch.no_grad()
def test_in_place_gives_the_same_bits():
    x, *parameters = inputs(2, 130, 48, True)
    expected = fused(x, *parameters)
    cpu_pointwise.norm_modulate_mlp_(x, *parameters, eps=EPS)
    assert torch.equal(x, expected)


@torch.no_grad()
def test_normalising_into_spare_memory_gives_the_same_bits():
    x, *parameters = inputs(2, 130, 48, False)
    out = torch.full_like(x, torch.nan)
    cpu_pointwise.norm_modulate_into(out, x, *parameters, eps=EPS)
    assert torch.equal(out, fused(x, *parameters))


@torch.no_grad()
@pytest.mark.parametrize(("batch", "points", "channels"), [(2, 101, 16), (1, 1, 128), (3, 50, 80), (2, 1200, 64)])
def test_joining_is_the_linear_layer_of_both(batch, points, channels):
    torch.manual_seed(0)
    x, skip = torch.randn(2, batch, points, channels)
    layer = torch.nn.Linear(2 * channels, channels)
    expected = F.linear(torch.cat([x, skip], dim=2).double(), layer.weight.double(), layer.bias.double())
    kept = skip.clone()
    cpu_pointwise.join_(x, skip, layer.weight, layer.bias)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=3e-6 * expected.abs().max().item())
    assert torch.equal(skip, kept)
