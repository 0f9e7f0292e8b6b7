"""The authors' names and layouts; with the stored vectors in `test_parity.py`, without them here."""

import pytest
import torch

from models.reference_weights import state_from_reference
from models.sparse_block import SparseBlock
from reference_networks import gradients_to_reference, network_from_reference

UNET = {
    "channels": 3,
    "nf": 4,
    "time_emb_dim": 8,
    "img_size": 8,
    "num_conv_blocks": 1,
    "knn_neighbours": 3,
    "uno_res": 4,
    "uno_mults": [1, 2],
    "z_dim": 5,
    "out_channels": None,
    "conv_type": "conv",
    "depthwise_sparse": False,
    "kernel_size": 3,
    "backend": "torchsparse",
    "optimise_dense": True,
    "blocks_per_level": [1, 1],
    "attn_res": [2],
    "dropout_res": 2,
    "dropout": 0.1,
    "uno_base_nf": 4,
}
ENCODER = {**UNET, "out_channels": 5, "z_dim": None, "stochastic": True}
LATENT = {"channels": 5, "hid_channels": 8, "num_layers": 3, "time_emb_channels": 6, "dropout": 0.0}


@pytest.mark.parametrize("depthwise", [True, False])
def test_torchsparse_kernels_run_along_rows_first(depthwise):
    k, channels, groups = 3, 4, 4 if depthwise else 1
    block = SparseBlock(channels, k, depthwise=depthwise, norm=False)
    kernel = torch.randn(k * k, channels // groups, channels)
    ours = {name: value for name, value in block.state_dict().items() if name.startswith("mlp")}
    state = state_from_reference(block, {**ours, "conv.kernel": kernel}, "ts")
    for row in range(k):
        for col in range(k):
            for i in range(channels // groups):
                for o in range(channels):
                    assert state["kernel"][o, i, row, col] == kernel[col * k + row, i, o]


@pytest.mark.parametrize("layout", ["ts", "td"])
@pytest.mark.parametrize(
    ("config", "kind"), [(UNET, "sparse_unet"), (ENCODER, "sparse_encoder"), (LATENT, "mlp_skip_net")]
)
def test_there_and_back(config, kind, layout):
    """Gradients leave under the names states arrive by: with the state as gradient, the circle closes."""
    backend = {"ts": "torchsparse", "td": "torch_dense"}[layout]
    network = network_from_reference({**config, "backend": backend}, kind)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_()
            if layout == "td" and name.endswith("bias") and "_blocks." in name and ".norm" in name:
                parameter.zero_()  # their norms have none
            parameter.grad = parameter.clone()
    theirs = gradients_to_reference(network, layout)
    state = state_from_reference(network, theirs, layout)
    assert set(state) == set(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value), name
    network.load_state_dict(state)


def test_shapes_of_the_two_layouts():
    def shapes(layout, backend):
        network = network_from_reference({**UNET, "backend": backend}, "sparse_unet")
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return {name: tuple(value.shape) for name, value in gradients_to_reference(network, layout).items()}

    ts, td = shapes("ts", "torchsparse"), shapes("td", "torch_dense")
    assert ts["down_blocks.0.block.conv.kernel"] == (9, 4, 4)
    assert td["down_blocks.0.block.conv.weight"] == (4, 4, 3, 3)
    assert ts["up_blocks.0.block.skip_linear.weight"] == (4, 8)
    assert td["up_blocks.0.block.skip_linear.weight"] == (4, 8, 1, 1)
    assert ts["up_blocks.0.block.norm1.weight"] == (4,)
    assert td["up_blocks.0.block.norm1.g"] == (1, 4, 1, 1)
    assert not any("norm1.bias" in name for name in td)
    for shapes_of in (ts, td):
        assert shapes_of["uno.downs.1.0.0.0.in_layers.0.weight"] == (1, 4, 1, 1)
        assert shapes_of["uno.downs.1.0.0.1.attn_linear.weight"] == (4, 128)
        assert shapes_of["uno.ups.0.0.0.0.res_conv.weight"] == (8, 12, 1, 1)
        assert shapes_of["uno.fc2.weight"] == (4, 128, 1, 1)
        assert shapes_of["time_mlp.3.bias"] == (8,)


def test_states_that_do_not_fit():
    network = network_from_reference(LATENT, "mlp_skip_net")
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state = gradients_to_reference(network, "ts")
    with pytest.raises(ValueError, match=r"no place for: layers\.7\.linear\.weight"):
        state_from_reference(network, {**state, "layers.7.linear.weight": torch.zeros(1)}, "ts")
    with pytest.raises(ValueError, match=r"lacks 'out_layer\.bias'"):
        state_from_reference(network, {k: v for k, v in state.items() if k != "out_layer.bias"}, "ts")
    with pytest.raises(ValueError, match=r"'out_layer\.bias' has shape \(2,\); 'out_layer\.bias' needs \(5,\)"):
        state_from_reference(network, {**state, "out_layer.bias": torch.zeros(2)}, "ts")
    with pytest.raises(ValueError, match="layout is 'spconv'"):
        state_from_reference(network, state, "spconv")
