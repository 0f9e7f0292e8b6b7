"""From configurations to networks; the only place that calls their constructors for training and sampling."""

from __future__ import annotations

from torch import nn

from configs.schema import LatentModelConfig, ModelConfig
from diffusion.coordinates import Size
from models import tiled
from models.grid_unet import GridSpec
from models.latent_mlp import MLPSkipNet
from models.operators.dispatch import use_backend
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseSpec, SparseUNet


def sparse_spec(config: ModelConfig) -> SparseSpec:
    """The architecture on the points; ValueError for settings that do not fit together."""
    return SparseSpec(
        channels=config.nf,
        num_blocks=config.num_conv_blocks,
        kernel_size=config.kernel_size,
        depthwise=config.depthwise_sparse,
        nearest=config.knn_neighbours,
        convention=config.coordinate_convention,
        kernel=config.kernel,
        tile_points=config.tile_points,
    )


def grid_spec(config: ModelConfig) -> GridSpec:
    """The U-Net on the grid; ValueError for settings that do not fit together."""
    return GridSpec(
        resolution=config.uno_res,
        base_channels=config.uno_base_channels,
        mults=tuple(config.uno_mults),
        blocks_per_level=tuple(config.uno_blocks_per_level),
        attention_resolutions=tuple(config.uno_attn_resolutions),
        dropout=config.uno_dropout,
        dropout_resolution=config.uno_dropout_from_resolution,
        conv_type=config.uno_conv_type,
        attention=config.attention,
        nodes=config.downsampling,
    )


def build_denoiser(config: ModelConfig, channels: int, train_size: Size) -> SparseUNet:
    """The denoiser of functions with `channels` channels, trained on the lattice `train_size`.

    A learned variance doubles the output channels. Raises ValueError for settings that do not fit together.
    """
    network = SparseUNet(
        channels,
        channels * (2 if config.learn_sigma else 1),
        train_size,
        sparse_spec(config),
        grid_spec(config),
        time_dim=config.time_emb_dim,
        z_dim=config.z_dim,
    )
    tiled.check(network)
    return use_backend(network, config.backend)


def build_encoder(config: ModelConfig, channels: int, train_size: Size) -> SparseEncoder:
    """The encoder that goes with `build_denoiser`."""
    network = SparseEncoder(
        channels,
        config.z_dim,
        train_size,
        sparse_spec(config),
        grid_spec(config),
        stochastic=config.stochastic_encoding,
        block_norm=config.encoder_block_norm,
        texture=tuple(config.encoder_texture),
    )
    return use_backend(network, config.backend)


def build_latent_model(config: LatentModelConfig, z_dim: int) -> MLPSkipNet:
    """The denoiser of latents of width `z_dim`."""
    return MLPSkipNet(
        z_dim,
        hidden=config.hid_channels,
        num_layers=config.num_layers,
        time_dim=config.time_embed_dim,
        dropout=config.dropout,
        out_channels=z_dim * (2 if config.learn_sigma else 1),
    )


def for_evaluation(network: nn.Module) -> nn.Module:
    """The network itself, as loaded weights are used: in evaluation mode, its parameters without gradients.

    Where weights require gradients, operators must take the slower ways that have them.
    """
    return network.eval().requires_grad_(False)
