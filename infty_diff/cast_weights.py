"""Weights cast once for many evaluations under autocast, which casts those that take no gradient at each of them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from models.sparse_block import SparseBlock


def cast_weights(network: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """`network` with the weights of its linear layers and convolutions in the type of autocast, for evaluation alone.

    Under autocast to `dtype` it computes what `network` does, bit for bit. Everything else is shared with it, the MLPs
    of `SparseBlock` too: their fused form multiplies weights in float32 before it casts. None returns `network`.
    """
    if dtype is None:
        return network
    twin = copy.copy(network)
    if isinstance(network, nn.Linear | nn.modules.conv._ConvNd):
        twin._parameters = {
            name: None if weight is None else weight.detach().to(dtype) for name, weight in network._parameters.items()
        }
    shared = {"mlp"} if isinstance(network, SparseBlock) else set()
    twin._modules = {
        name: part if name in shared or part is None else cast_weights(part, dtype)
        for name, part in network._modules.items()
    }
    return twin
