"""Layers and blocks: time features, modulation, attention, sparse block, grid block."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.coordinates import Points
from models.grid_unet import GridBlock, GridSpec
from models.layers import Attention, latent_sinusoidal_features, sinusoidal_features
from models.modulation import Conditioning, Modulation
from models.operators.pointwise.norm_mlp import modulate
from models.operators.sparse_conv.backend import resampled_shape
from models.sparse_block import SparseBlock
from networks import random_index, randomised

CPU = torch.device("cpu")


def test_time_features_are_sinusoids():
    for t in (0.0, 1.0, 417.0):
        ours = sinusoidal_features(torch.tensor([t]), 8)[0].tolist()
        angles = [t * 10000 ** (-j / 3) for j in range(4)]
        assert ours == pytest.approx([math.sin(a) for a in angles] + [math.cos(a) for a in angles], abs=1e-4)
        ours = latent_sinusoidal_features(torch.tensor([t]), 7)[0].tolist()
        angles = [t * 10000 ** (-j / 3) for j in range(3)]
        assert ours == pytest.approx([math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0], abs=1e-4)


@pytest.mark.parametrize(("time_dim", "z_dim"), [(6, 3), (6, None), (None, 3)])
def test_conditioning_is_that_of_each_norm_and_item(time_dim, z_dim):
    """Norms of several widths in any order, as one scale and one shift of what the norm makes without its own."""
    torch.manual_seed(0)
    modulated = [(randomised(torch.nn.LayerNorm(c)), Modulation(c, time_dim, z_dim)) for c in (4, 2, 4, 5)]
    e, z = torch.randn(2, 6), torch.randn(2, 3)
    affines = Conditioning(modulated, z if z_dim else None)(e if time_dim else None)
    for (norm, modulation), (a, b) in zip(modulated, affines, strict=True):
        x = torch.randn(2, 3, 5, norm.weight.shape[0])
        for i in range(2):
            expected = norm(x[i])
            if time_dim:
                scale, shift = modulation.time[1](F.gelu(e[i])).chunk(2)
                expected = expected * (1 + scale) + shift
            if z_dim:
                expected = expected * (1 + modulation.z(z[i]))
            torch.testing.assert_close(F.layer_norm(x[i], norm.normalized_shape) * a[i] + b[i], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_modulation_is_not_rounded_in_half_precision(dtype):
    torch.manual_seed(0)
    h, a, b = torch.randn(2, 50, 4).to(dtype), torch.randn(2, 4), torch.randn(2, 4)
    product, found = h.double() * a.double()[:, None], modulate(h, a, b)
    exact = product + b.double()[:, None]
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (product.abs() + b.abs()[:, None])
    assert found.dtype == dtype and ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("channels", "heads"), [(8, 4), (160, 5)])
def test_attention_is_a_softmax_over_positions(channels, heads):
    torch.manual_seed(0)
    attention, x = Attention(channels), torch.randn(2, 3, 4, channels)
    tokens = F.layer_norm(x.view(2, 12, channels), (channels,))
    qkv = F.linear(tokens, attention.qkv.weight, attention.qkv.bias).view(2, 12, 3, heads, 32)
    logits = torch.einsum("bqhd,bkhd->bhqk", qkv[:, :, 0], qkv[:, :, 1]) / math.sqrt(32)
    mixed = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(3), qkv[:, :, 2]).reshape(2, 12, heads * 32)
    torch.testing.assert_close(attention(x), x + attention.out(mixed).view_as(x), rtol=1e-4, atol=1e-5)


def test_attention_kernels_that_are_not_there():
    with pytest.raises(ValueError, match=r"model\.attention is 'xla'.*sdpa"):
        Attention(8, "xla")
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"flash_attn.*not installed.*pip install flash-attn"):
            Attention(8, "flash_attn")


def block_and_inputs(**options):
    torch.manual_seed(0)
    block = randomised(SparseBlock(6, 3, **options)).double()
    size, train_size = (5, 7), (5, 6)
    index = random_index(2, size, 14, None)
    x = torch.randn(2, 14, 6, dtype=torch.float64, requires_grad=True)
    points = Points(size, index)
    return block, x, block.backend.plan(points, 2, resampled_shape(3, size, train_size), 3, CPU)


def test_sparse_block_by_its_equations():
    block, x, plan = block_and_inputs(takes_skip=True, time_dim=5, z_dim=4)
    skip, e, z = (torch.randn(2, *n, dtype=torch.float64) for n in ((14, 6), (5,), (4,)))
    scale1, shift1 = block.modulation1.time(e).unsqueeze(1).chunk(2, dim=2)
    scale2, shift2 = block.modulation2.time(e).unsqueeze(1).chunk(2, dim=2)
    y = torch.cat([x, skip], 2) @ block.skip.weight.T + block.skip.bias
    h = F.layer_norm(y, (6,), block.norm1.weight, block.norm1.bias, 1e-5) * (1 + scale1) + shift1
    y = y + block.backend.conv(h * (1 + block.modulation1.z(z).unsqueeze(1)), block.kernel, plan, 6)
    h = F.layer_norm(y, (6,), block.norm2.weight, block.norm2.bias, 1e-5) * (1 + scale2) + shift2
    y = y + block.mlp(h * (1 + block.modulation2.z(z).unsqueeze(1)))
    affines = Conditioning(block.modulated, z)(e)
    torch.testing.assert_close(block(x, plan, skip=skip, affines=affines), y)


def test_sparse_block_without_norms():
    block, x, plan = block_and_inputs(norm=False)
    c = block.backend.conv(x, block.kernel, plan, 6)
    torch.testing.assert_close(block(x, plan), x + c + block.mlp(c))
    assert not any("norm" in name for name, _ in block.named_parameters())
    with pytest.raises(ValueError, match="norm is False; accepted: True"):
        SparseBlock(4, 3, norm=False, time_dim=4)


@pytest.mark.parametrize("options", [{}, {"depthwise": False}, {"norm": False}])
def test_gradients_of_the_sparse_block(options):
    block, x, plan = block_and_inputs(**options)
    assert torch.autograd.gradcheck(lambda x, kernel, *_: block(x, plan), (x, block.kernel, *block.mlp.parameters()))


def test_kernel_sizes_must_be_odd():
    with pytest.raises(ValueError, match=r"model\.kernel_size is 4"):
        SparseBlock(4, 4)


@pytest.mark.parametrize("conv_type", ["conv", "spectral"])
def test_gradients_of_the_grid_block(conv_type):
    torch.manual_seed(0)
    block = randomised(GridBlock(2, 3, 4, 3, dropout=0.0, conv_type=conv_type)).double()
    x, e, z = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((2, 4, 3, 2), (2, 4), (2, 3)))

    def value(*_):
        return block(x, *Conditioning(block.modulated, z)(e))

    assert torch.autograd.gradcheck(value, (x, e, z, *block.parameters()))


def test_grid_specifications_that_do_not_fit():
    fits = {"resolution": 12, "base_channels": 8, "mults": (1, 2, 2), "blocks_per_level": (1, 1, 1)}
    assert [GridSpec(**fits).side(level) for level in range(3)] == [12, 6, 3]
    for change, message in (
        ({"resolution": 10}, "uno_res is 10; accepted: a multiple of 4, for 3 levels"),
        ({"resolution": 0}, "uno_res is 0"),
        ({"mults": ()}, "uno_mults is empty"),
        ({"blocks_per_level": (1, 1)}, "uno_blocks_per_level is .1, 1.; accepted: 3 entries"),
        ({"conv_type": "mystery"}, "uno_conv_type is 'mystery'"),
    ):
        with pytest.raises(ValueError, match=message):
            GridSpec(**{**fits, **change})
