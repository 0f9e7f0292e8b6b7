"""Small networks, points and inputs that the tests of models share."""

import torch

from diffusion.coordinates import Points
from models.grid_unet import GridSpec
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseSpec, SparseUNet

SPARSE = SparseSpec(channels=6, num_blocks=2, kernel_size=3)
GRID = GridSpec(
    resolution=4,
    base_channels=6,
    mults=(1, 2),
    blocks_per_level=(1, 1),
    attention_resolutions=(2,),
    dropout=0.5,
    dropout_resolution=2,
)


def randomised(module):
    """Parameters away from their initial values, so that no norm is an identity and no bias zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))  # whatever its layout
    return module.eval()


def denoiser(channels=3, out_channels=3, train_size=(8, 8), z_dim=5, sparse=SPARSE, grid=GRID):
    torch.manual_seed(0)
    return randomised(SparseUNet(channels, out_channels, train_size, sparse, grid, time_dim=8, z_dim=z_dim))


def encoder(channels=3, train_size=(8, 8), sparse=SPARSE, grid=GRID, **options):
    torch.manual_seed(0)
    return randomised(SparseEncoder(channels, 5, train_size, sparse, grid, **options))


def random_index(batch, size, count, seed=0):
    """Pixel ids (B, M) in no order; other ones at every call where seed is None."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size[0] * size[1], generator=generator)[:count] for _ in range(batch)])


def random_points(batch, size, count):
    """Points in no order; all of them in theirs where count is None."""
    return Points(size, None if count is None else random_index(batch, size, count, None))


def inputs(batch, points, channels=3, z_dim=5):
    z = None if z_dim is None else torch.randn(batch, z_dim)
    return torch.randn(batch, points.count, channels), torch.linspace(0, 999, batch), z


def all_parameters_have_gradients(module):
    return [name for name, p in module.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
