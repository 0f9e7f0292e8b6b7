"""The authors' configurations, parameter names, shapes and layouts, and what they are here. The one place to know them.

Two layouts exist, after the back end that stored the weights: "ts" (torchsparse; kernels (k², in/groups, out) whose
rows run fastest) and "td" (torch_dense; kernels as `Conv2d`, pointwise layers as 1×1 convolutions, norms of the
sparse blocks without bias). Networks are built with the authors' coordinates and, in the ts layout, the encoder
without block norms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from models.grid_unet import GridBlock, GridEncoder, GridLevel, GridUNet
from models.latent_mlp import MLPLayer, MLPSkipNet
from models.layers import Attention
from models.sparse_block import SparseBlock
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseDescent, SparseUNet

LAYOUTS = {"torchsparse": "ts", "torch_dense": "td"}

# What their state holds and ours does not: constants, and parameters of parts that a network never uses.
_LEFT_OUT = re.compile(r"(.*\.)?(uno_coords|normalising_conv\.\w+|(time_mlp|z_mlp|norm)[12]\..*|(time|z_mlp)\.\d\.\w+)")


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _as_conv(tensor: torch.Tensor) -> torch.Tensor:
    """A `Linear`'s weight as that of a 1×1 convolution; its bias as it is."""
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor


def _as_image(tensor: torch.Tensor) -> torch.Tensor:
    """A vector over channels as (1, C, 1, 1)."""
    return tensor.view(1, -1, 1, 1)


def _as_offsets(tensor: torch.Tensor) -> torch.Tensor:
    """(out, in, row, column) to (k², in, out), the row running fastest."""
    return tensor.permute(3, 2, 1, 0).flatten(0, 1)


class _Rule(NamedTuple):
    """A part of our name, a regular expression; theirs, None where they have no such parameter; ours to their shape."""

    ours: str
    theirs: str | None
    reshape: Callable[[torch.Tensor], torch.Tensor] = _same


_TRUNK = [_Rule(r"fc[012]", r"\g<0>", _as_conv), _Rule(r"mid_attention", "mid_attn")]
_NETWORK = [
    _Rule(r"time_mlp\.0", "time_mlp.1"),
    _Rule(r"time_mlp\.2", "time_mlp.3"),
    _Rule(r"(down|up)_blocks\.\d+", r"\g<0>.block"),
    _Rule(r"to_grid", "uno_linear_in"),
    _Rule(r"from_grid", "uno_linear_out"),
    _Rule(r"grid", "uno"),
]
_BLOCK = [_Rule(r"modulation([12])\.time", r"time_mlp\1"), _Rule(r"modulation([12])\.z", r"z_mlp\1")]
_RULES: dict[type, list[_Rule]] = {
    SparseUNet: _NETWORK,
    SparseEncoder: _NETWORK,
    GridUNet: _TRUNK,
    GridEncoder: _TRUNK,
    GridLevel: [
        _Rule(r"blocks\.(\d+)", r"0.\1.0"),
        _Rule(r"attentions\.(\d+)", r"0.\1.1"),
        _Rule(r"resample", "1"),
    ],
    GridBlock: [
        _Rule(r"norm_in", "in_layers.0", _as_image),
        _Rule(r"conv_in", "in_layers.2"),
        _Rule(r"norm_out", "norm", _as_image),
        _Rule(r"modulation\.time", "time"),
        _Rule(r"modulation\.z", "z_mlp"),
        _Rule(r"conv_out", "out_layers.2"),
        _Rule(r"shortcut", "res_conv", _as_conv),
    ],
    Attention: [_Rule(r"out", "attn_linear")],
    MLPSkipNet: [_Rule(r"time_mlp", "time_embed")],
    MLPLayer: [_Rule(r"scale", "cond_layers.1")],
}
_BLOCK_RULES: dict[str, list[_Rule]] = {
    "ts": [*_BLOCK, _Rule(r"skip", "skip_linear"), _Rule(r"kernel", "conv.kernel", _as_offsets)],
    "td": [
        *_BLOCK,
        _Rule(r"skip", "skip_linear", _as_conv),
        _Rule(r"mlp\.\d", r"\g<0>", _as_conv),
        _Rule(r"kernel", "conv.weight"),
        _Rule(r"(norm[12])\.weight", r"\1.g", _as_image),
        _Rule(r"norm[12]\.bias", None),
    ],
}


def translate(module: nn.Module, name: str, layout: str) -> tuple[str, Callable] | None:
    """Their name for a parameter of a module, and what gives it their shape; None where they have no such parameter."""
    rules = _BLOCK_RULES[layout] if isinstance(module, SparseBlock) else _RULES.get(type(module), [])
    for rule in [*rules, _Rule(r"\w+", r"\g<0>")]:
        match = re.match(rf"(?:{rule.ours})(?=\.|$)", name)
        if match is None:
            continue
        if rule.theirs is None:
            return None
        theirs, rest = match.expand(rule.theirs), name[match.end() + 1 :]
        if not rest:
            return theirs, rule.reshape
        inner = translate(module.get_submodule(match.group(0)), rest, layout)
        if inner is None:
            return None
        return f"{theirs}.{inner[0]}", inner[1] if rule.reshape is _same else rule.reshape
    raise AssertionError(f"no rule for {name}")


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS.values():
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(LAYOUTS.values())}")


def layout_of_state(arrays: Mapping[str, torch.Tensor]) -> str:
    """The layout of a denoiser's or an encoder's state. Raises ValueError where it is neither of the two."""
    for name, layout in (("conv.kernel", "ts"), ("norm1.g", "td")):
        if f"down_blocks.0.block.{name}" in arrays:
            return layout
    raise ValueError(f"the reference state holds no sparse blocks as {' or '.join(LAYOUTS)} stores them")


def _long_sides(tensor: torch.Tensor) -> list[int]:
    """The sides of a tensor that are not 1: back ends differ in whether they store the others."""
    return [side for side in tensor.shape if side != 1]


def state_from_reference(module: nn.Module, arrays: Mapping[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The state of `module`, or of any part of a network, from tensors under the authors' names.

    Biases their norms lack are zero. Of the module only shapes and types are read, so that it may be on the meta
    device. Raises ValueError when one of its parameters is missing or has the wrong shape, when the grid is another
    one, or when a tensor is left over that is not known to be without effect.
    """
    _check_layout(layout)
    _check_grid(module, arrays)
    state, used = {}, set()
    for name, ours in module.state_dict().items():
        translated = translate(module, name, layout)
        if translated is None:
            state[name] = torch.zeros(ours.shape, dtype=ours.dtype)
            continue
        theirs, reshape = translated
        if theirs not in arrays:
            raise ValueError(f"the reference state lacks {theirs!r}, needed for {name!r}")
        value = torch.as_tensor(arrays[theirs])
        if _long_sides(value) != _long_sides(reshape(ours)):
            raise ValueError(f"{theirs!r} has shape {tuple(value.shape)}; {name!r} needs {tuple(ours.shape)}")
        if reshape is _as_offsets:
            k, c_in, c_out = ours.shape[2], ours.shape[1], ours.shape[0]
            value = value.reshape(k, k, c_in, c_out).permute(3, 2, 1, 0)  # from (column, row, in, out)
        state[name] = value.reshape(ours.shape).to(ours.dtype).contiguous()
        used.add(theirs)
    unknown = sorted(name for name in set(arrays) - used if not _LEFT_OUT.fullmatch(name))
    if unknown:
        listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise ValueError(f"the reference state holds tensors that this network has no place for: {listed}")
    return state


def _check_grid(module: nn.Module, arrays: Mapping[str, torch.Tensor]) -> None:
    """The side of the grid shapes no parameter; it shows in a constant that only whole networks have."""
    if isinstance(module, SparseDescent) and "uno_coords" in arrays:
        shape, side = tuple(arrays["uno_coords"].shape), module.grid_spec.resolution
        if shape != (1, side * side, 2):
            raise ValueError(f"'uno_coords' has shape {shape}; model.uno_res={side} needs {(1, side * side, 2)}")
