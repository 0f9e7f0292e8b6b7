"""Networks by the authors' configurations, and gradients under the authors' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.grid_unet import GridSpec
from models.latent_mlp import MLPSkipNet
from models.reference_weights import LAYOUTS, translate
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseSpec, SparseUNet


def gradients_to_reference(module: nn.Module, layout: str) -> dict[str, torch.Tensor]:
    """Gradients of the module's parameters that have one, under the authors' names and in their shapes and layout."""
    gradients = {}
    for name, parameter in module.named_parameters():
        translated = translate(module, name, layout)
        if translated is not None and parameter.grad is not None:
            theirs, reshape = translated
            gradients[theirs] = reshape(parameter.grad)
    return gradients


def network_from_reference(config: Mapping[str, Any], kind: str, convention: str = "reference") -> nn.Module:
    """The network that an authors' configuration (constructor arguments by their names) describes, freshly initialised.

    kind: "sparse_unet", "sparse_encoder" or "mlp_skip_net". convention: coordinates, the authors' by default.
    """
    if kind == "mlp_skip_net":
        return MLPSkipNet(
            config["channels"],
            hidden=config["hid_channels"],
            num_layers=config["num_layers"],
            time_dim=config["time_emb_channels"],
            dropout=config["dropout"],
        )
    assert config["conv_type"] == "conv"
    sparse = SparseSpec(
        channels=config["nf"],
        num_blocks=config["num_conv_blocks"],
        kernel_size=config["kernel_size"],
        depthwise=config["depthwise_sparse"],
        nearest=config["knn_neighbours"],
        convention=convention,
    )
    grid = GridSpec(
        resolution=config["uno_res"],
        base_channels=config["uno_base_nf"],
        mults=tuple(config["uno_mults"]),
        blocks_per_level=tuple(config["blocks_per_level"]),
        attention_resolutions=tuple(config["attn_res"]),
        dropout=config["dropout"],
        dropout_resolution=config["dropout_res"],
    )
    channels, train_size = config["channels"], (config["img_size"], config["img_size"])
    if kind == "sparse_encoder":
        return SparseEncoder(
            channels,
            config["out_channels"],
            train_size,
            sparse,
            grid,
            stochastic=config["stochastic"],
            block_norm=LAYOUTS[config["backend"]] == "td",
        )
    return SparseUNet(
        channels,
        config["out_channels"] or channels,
        train_size,
        sparse,
        grid,
        time_dim=config["time_emb_dim"],
        z_dim=config["z_dim"],
    )
