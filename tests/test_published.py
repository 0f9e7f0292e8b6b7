"""The step as published, against the networks of this repository in the convention of the authors' code."""

import pytest
import torch

from benchmarks import published
from diffusion.coordinates import Points
from models.grid_unet import GridSpec
from models.operators.dispatch import use_backend
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseSpec, SparseUNet

GRID = GridSpec(resolution=8, base_channels=6, mults=(1, 2), blocks_per_level=(1, 2), attention_resolutions=(4,))
SPARSE = SparseSpec(channels=8, num_blocks=2, kernel_size=5, convention="reference")


@pytest.mark.parametrize(("size", "count"), [((13, 11), 40), ((12, 10), 120), ((9, 13), 17)])
def test_networks_give_the_same_numbers(size, count, monkeypatch):
    """On lattices without equally near points, among which the order of rounding errors would choose."""
    monkeypatch.setattr(published, "_DISTANCES", 500)  # so that nodes come in several parts
    torch.manual_seed(0)
    denoiser = use_backend(SparseUNet(3, 3, size, SPARSE, GRID, time_dim=8, z_dim=5).double().eval(), "torch_dense")
    encoder = use_backend(SparseEncoder(3, 5, size, SPARSE, GRID).double().eval(), "torch_dense")
    index = torch.stack([torch.randperm(size[0] * size[1])[:count] for _ in range(2)])
    x, t = torch.randn(2, count, 3, dtype=torch.float64), torch.tensor([3.0, 700.0])
    points, lattice = Points(size, index), published.Lattice(size, index, 5)
    for name in ("coordinates", "mask", "density"):
        setattr(lattice, name, getattr(lattice, name).double())
    z = encoder(x, points)
    torch.testing.assert_close(published.encode(encoder, x, lattice), z, rtol=1e-4, atol=1e-6)
    found = published.denoise(denoiser, x, lattice, t, z)
    torch.testing.assert_close(found, denoiser(x, points, t, z), rtol=1e-4, atol=1e-6)
