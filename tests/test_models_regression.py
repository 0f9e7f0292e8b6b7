"""A few numbers of every network, made by our own code once it agreed with the parity vectors; they need no other file.

`PYTHONPATH=. python tests/test_models_regression.py` writes them anew, after a change that is meant to change them.
"""

from pathlib import Path

import torch

from diffusion.coordinates import Points
from models.grid_unet import GridSpec
from models.latent_mlp import MLPSkipNet
from models.operators.dispatch import use_backend
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseSpec, SparseUNet
from regression import compare, keep, waves

NUMBERS = Path(__file__).with_name("regression_models.json")
TOLERANCE = 2e-5  # relative to the largest value, as for the parity vectors


def with_waves(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for i, (name, parameter) in enumerate(module.named_parameters()):
            scale = 0.8 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.3
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(one + scale * waves(*parameter.shape, phase=i))
    return module.eval()


def points(size: tuple[int, int], subset: bool) -> Points:
    total = size[0] * size[1]
    index = torch.stack([(torch.arange(total // 4) * 29 + 3 * b) % total for b in range(2)])
    return Points(size, index if subset else None)


def networks(conv_type: str, convention: str, depthwise: bool) -> tuple[SparseUNet, SparseEncoder]:
    sparse = SparseSpec(6, 2, 5, depthwise, nearest=3, convention=convention)
    grid = GridSpec(8, 6, (1, 2), (1, 2), attention_resolutions=(4,), conv_type=conv_type)
    network = SparseUNet(3, 3, (16, 16), sparse, grid, time_dim=8, z_dim=5)
    encoder = SparseEncoder(3, 5, (16, 16), sparse, grid, stochastic=True)
    return tuple(with_waves(use_backend(module, "torch_dense")) for module in (network, encoder))


def results() -> dict[str, torch.Tensor]:
    """Every number that is kept, by name."""
    found = {}
    t, z = torch.tensor([3.0, 640.0]), waves(2, 5, phase=0.1)
    for conv_type, convention, depthwise in (
        ("conv", "cell_centred", True),
        ("conv", "reference", False),
        ("spectral", "cell_centred", True),
    ):
        network, encoder = networks(conv_type, convention, depthwise)
        for size, subset in (((16, 16), True), ((16, 16), False), ((32, 20), False)):
            where, name = points(size, subset), f"{conv_type}/{convention}/{size[0]}x{size[1]}/{subset}"
            x = waves(2, where.count, 3, phase=0.2)
            found[f"denoiser/{name}"] = network(x, where, t, z)[:, :: where.count // 3]
            found[f"encoder/{name}"] = torch.cat(encoder(x, where, noise=z), dim=1)
    latent = with_waves(MLPSkipNet(5, 12, 4, 7))
    found["latent"] = latent(z, t)
    return {name: value.detach() for name, value in found.items()}


def test_numbers_are_what_they_were():
    compare(NUMBERS, results(), TOLERANCE)


if __name__ == "__main__":
    keep(NUMBERS, results())
