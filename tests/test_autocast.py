"""Under autocast every product is handed half precision: nothing in between goes back to float32.

Autocast on a GPU computes norms in float32 and leaves their result so, which doubles what GELU and dropout read, write
and keep. On a CPU the networks run in bfloat16; for a GPU their types follow from fake tensors.
"""

import contextlib

import pytest
import torch
from torch import nn

from diffusion.coordinates import Points
from fake_gpu import autocast, can_pretend, moved
from models.grid_unet import GridEncoder, GridSpec, GridUNet
from models.latent_mlp import MLPSkipNet
from models.modulation import Conditioning
from models.operators.dispatch import use_backend
from models.operators.pointwise.norm_mlp import norm_modulate
from models.sparse_block import SparseBlock

BF16 = torch.bfloat16
GRID = GridSpec(8, 8, (1, 2), (1, 1), attention_resolutions=(4,), dropout=0.1, dropout_resolution=8)
PLACES = ["cpu", pytest.param("cuda", marks=can_pretend)]


@contextlib.contextmanager
def networks_on(place, fake_gpu):
    """Autocast on a CPU, or on a GPU that holds no values."""
    with fake_gpu() if place == "cuda" else contextlib.nullcontext(), torch.device(place), autocast(place, BF16):
        yield


def types_of_inputs(network: nn.Module, *inputs) -> dict[str, torch.dtype]:
    """The type in which each layer that multiplies or drops out gets its features."""
    found = {}

    def note(module, given):
        found[names[module]] = given[0].dtype

    names = {module: name for name, module in network.named_modules()}
    for module in names:
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.Dropout):
            module.register_forward_pre_hook(note)
    out = network(*inputs)
    assert out.dtype == BF16
    return found


def affines_of(unet: GridUNet) -> list:
    """At random times and latents."""
    modulated = [pair for block in unet.blocks() for pair in block.modulated]
    found = Conditioning(modulated, torch.randn(2, 5))(torch.randn(2, 6))
    assert all(vector.dtype == torch.float32 for affine in found for vector in affine)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_grid_networks(place, fake_gpu):
    unet, encoder = GridUNet(GRID, 6, 5), GridEncoder(GRID, 7)
    with networks_on(place, fake_gpu):
        x, affines = torch.randn(2, 8, 8, 8), affines_of(moved(unet, place))
        found = types_of_inputs(unet, x, affines)
        assert {name for name, dtype in found.items() if dtype != BF16} == {"fc0"}
        assert any(name.endswith("attentions.0.qkv") for name in found) and "mid_block1.conv_in" in found
        found = types_of_inputs(moved(encoder, place), x)
        assert {name for name, dtype in found.items() if dtype != BF16} == {"fc0"}


@pytest.mark.parametrize("place", PLACES)
def test_latent_network(place, fake_gpu):
    with networks_on(place, fake_gpu):
        found = types_of_inputs(MLPSkipNet(6, 16, 4, 8, dropout=0.1), torch.randn(3, 6), torch.rand(3))
        assert {name for name, dtype in found.items() if dtype != BF16} == {"time_mlp.0", "in_layer.linear"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kernel", ["linear", "nonlinear"])
def test_sparse_block(place, kernel, fake_gpu):
    with networks_on(place, fake_gpu):
        block = use_backend(SparseBlock(8, 3, time_dim=6, z_dim=5, kernel=kernel), "torch_dense")
        points = Points((5, 7))
        plan = block.backend.plan(points, 2, (3, 3), 3, torch.device(place))
        x = torch.randn(2, 35, 8, dtype=BF16)
        affines = Conditioning(block.modulated, torch.randn(2, 5))
        types = []
        block.backend.conv, conv = lambda h, *rest: types.append(h.dtype) or conv(h, *rest), block.backend.conv
        assert block(x, plan, affines=affines(torch.randn(2, 6))).dtype == BF16
        assert types == [BF16] * block.convolutions


def test_without_autocast_nothing_is_rounded():
    norm = nn.LayerNorm(8)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 3, 8, dtype=dtype)
        assert norm_modulate(x, norm.to(dtype)).dtype == dtype
    assert MLPSkipNet(6, 16, 4, 8)(torch.randn(3, 6), torch.rand(3)).dtype == torch.float32


def test_types_do_not_break_the_graph():
    network, x = GridUNet(GRID, 6, 5).eval(), torch.randn(2, 8, 8, 8)
    whole = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.autocast("cpu", BF16), torch.no_grad():
        affines = affines_of(network)
        torch.testing.assert_close(whole(x, affines), network(x, affines), rtol=2e-2, atol=2e-2)
