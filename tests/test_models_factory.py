"""From configurations to networks: sizes of the published models, and that every field arrives."""

import re
from dataclasses import replace

import pytest
import torch

from configs.schema import LatentModelConfig, ModelConfig
from diffusion.coordinates import CONVENTIONS, Points
from models.coarse_nodes import NODES
from models.factory import build_denoiser, build_encoder, build_latent_model
from models.grid_unet import CONV_TYPES
from models.sparse_block import KERNELS

PUBLISHED_256 = ModelConfig()
PUBLISHED_128 = replace(
    PUBLISHED_256,
    uno_res=64,
    uno_base_channels=64,
    uno_mults=(1, 2, 4, 8),
    uno_blocks_per_level=(2, 2, 2, 2),
    z_dim=256,
)
TINY = replace(
    PUBLISHED_256,
    nf=4,
    time_emb_dim=8,
    num_conv_blocks=1,
    kernel_size=3,
    uno_res=4,
    uno_base_channels=4,
    uno_mults=(1, 2),
    uno_blocks_per_level=(1, 1),
    z_dim=6,
)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "size", "denoiser", "denoiser_grid", "encoder", "encoder_grid"),
    [
        (PUBLISHED_256, (256, 256), 321_513_283, 319_988_224, 121_180_032, 120_061_952),
        (PUBLISHED_128, (128, 128), 43_591_747, 42_664_768, 16_256_832, 16_126_720),
    ],
)
def test_sizes_of_the_published_models(config, size, denoiser, denoiser_grid, encoder, encoder_grid):
    """Counted without memory. The published encoders hold 798 720 and 266 240 more, time layers that are never used."""
    with torch.device("meta"):
        network, coder = build_denoiser(config, 3, size), build_encoder(config, 3, size)
    assert (parameters(network), parameters(network.grid)) == (denoiser, denoiser_grid)
    assert (parameters(coder), parameters(coder.grid)) == (encoder, encoder_grid)
    assert not list(network.buffers()) and not list(coder.buffers())


def test_size_of_the_published_latent_model():
    with torch.device("meta"):
        network = build_latent_model(LatentModelConfig(), 1024)
    layer_in, layer = 1024 * 2048 + 2048, 3072 * 2048 + 2048
    modulation_and_norm = 1024 * 2048 + 2048 + 2 * 2048
    time = 128 * 1024 + 1024 + 1024 * 1024 + 1024
    expected = time + layer_in + 8 * layer + 9 * modulation_and_norm + 3072 * 1024 + 1024
    assert parameters(network) == expected == 75_705_344


def test_fields_arrive():
    network = build_denoiser(replace(TINY, learn_sigma=True, coordinate_convention="reference"), 2, (8, 6))
    assert network.linear_out.out_features == 4
    assert network.convention.name == "reference"
    assert network.train_size == (8, 6)
    assert build_denoiser(replace(TINY, depthwise_sparse=False), 2, (8, 6)).down_blocks[0].kernel.shape == (4, 4, 3, 3)
    assert build_encoder(replace(TINY, encoder_block_norm=False), 2, (8, 6)).down_blocks[0].norm1 is None
    assert build_encoder(replace(TINY, stochastic_encoding=True), 2, (8, 6)).mu is not None
    assert build_encoder(TINY, 2, (8, 6)).texture is None
    assert build_latent_model(LatentModelConfig(learn_sigma=True, hid_channels=8), 6).out_layer.out_features == 12


@pytest.mark.parametrize("conv_type", ["conv", "spectral"])
def test_a_tiny_configuration_runs(conv_type):
    config = replace(TINY, uno_conv_type=conv_type)
    network, coder = build_denoiser(config, 1, (8, 6)), build_encoder(config, 1, (8, 6))
    points, x = Points((16, 9)), torch.randn(2, 144, 1)
    z = coder(x, points)
    assert network(x, points, torch.zeros(2), z).shape == x.shape
    assert build_latent_model(LatentModelConfig(hid_channels=8), 6)(z, torch.zeros(2)).shape == z.shape


OPTIONS = [
    *({"backend": name} for name in ("auto", "native", "torch_dense")),
    *({"kernel": name} for name in KERNELS),
    *({"uno_conv_type": name} for name in CONV_TYPES),
    *({"downsampling": name} for name in NODES),
    *({"coordinate_convention": name} for name in CONVENTIONS),
    {"depthwise_sparse": False, "learn_sigma": True, "stochastic_encoding": True, "encoder_block_norm": False},
    {"encoder_texture": (2, 1)},
    {"tile_points": 40},
]


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_every_option_is_built_without_memory(change):
    """As a dry run does. Weights made elsewhere then fit."""
    config = replace(TINY, **change)
    for build in (build_denoiser, build_encoder):
        with torch.device("meta"):
            network = build(config, 1, (8, 6))
        assert all(tensor.is_meta for tensor in network.state_dict().values())
        network.load_state_dict(build(config, 1, (8, 6)).state_dict(), assign=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uno_res": 5}, "uno_res is 5"),
        ({"backend": "abacus"}, "model.backend is 'abacus'"),
        ({"tile_points": 20}, "model.tile_points is 20"),
        ({"attention": "xla"}, "model.attention is 'xla'"),
        ({"downsampling": "random", "uno_conv_type": "spectral"}, "model.uno_conv_type is 'spectral'"),
        ({"time_emb_dim": 9}, "model.time_emb_dim is 9"),
        ({"kernel_size": 2}, "kernel_size is 2"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        with torch.device("meta"):
            build_denoiser(replace(TINY, **change), 1, (8, 6))


@pytest.mark.parametrize("windows", [(4,), (2, 1, 1), (1, 1000)])
def test_windows_that_do_not_fit(windows):
    with pytest.raises(ValueError, match=re.escape(f"model.encoder_texture is {windows}")):
        build_encoder(replace(TINY, encoder_texture=windows), 1, (8, 6))


def test_texture_wants_a_grid():
    with pytest.raises(ValueError, match=r"model\.downsampling is 'random'"):
        build_encoder(replace(TINY, downsampling="random", encoder_texture=(2, 1)), 1, (8, 6))
