"""What the operators are measured against: dense arithmetic on masked grids, and searches through all points.

The masked block is written twice: with the fused norms and channels-last products of this repository, and the way the
published code computes it, on images with a norm of elementary operations and 1 × 1 convolutions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from diffusion.coordinates import CONVENTIONS, Points, gather_points, points_to_image, scatter_points
from models.modulation import Conditioning
from models.operators.pointwise.norm_mlp import norm_modulate
from models.operators.sparse_conv.backend import Plan
from models.sparse_block import SparseBlock

_LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def dense_variants(device: torch.device) -> dict[str, tuple[torch.memory_format, bool]]:
    """Every way to run a dense convolution: layout, and on a GPU with and without cuDNN."""
    if device.type != "cuda":
        return {name: (layout, True) for name, layout in _LAYOUTS.items()}
    return {
        f"{name} {'cudnn' if cudnn else 'native'}": (layout, cudnn)
        for name, layout in _LAYOUTS.items()
        for cudnn in (True, False)
    }


@contextlib.contextmanager
def convolutions(cudnn: bool) -> Iterator[None]:
    """Convolve with cuDNN, tuned for the shape, or without; in float32 without TF32, as the project does."""
    with torch.backends.cudnn.flags(enabled=cudnn, benchmark=True, allow_tf32=False):
        yield


def masked_convolution(x: torch.Tensor, weight: torch.Tensor, plan: Plan, layout: torch.memory_format) -> torch.Tensor:
    """The depthwise convolution at the points: onto a grid of zeros in `layout`, `conv2d`, back; (B, M, C)."""
    image = scatter_points(x, plan.points).contiguous(memory_format=layout)
    out = F.conv2d(image, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=x.shape[2])
    return gather_points(out, plan.points) * plan.inverse_density.to(x.dtype)


class MaskedBlock:
    """A `SparseBlock` on whole grids that hold zeros where no point is.

    block: whose weights are used. plan: of the points.
    """

    def __init__(self, block: SparseBlock, plan: Plan) -> None:
        self.block, self.size, self.batch = block, plan.points.size, plan.batch
        ones = torch.ones(plan.batch, plan.points.count, 1, device=plan.inverse_density.device)
        self.mask = scatter_points(ones, plan.points)  # (B, 1, H, W)
        density = scatter_points(1 / plan.inverse_density.expand(plan.batch, -1, -1), plan.points)
        self.density = density.where(self.mask > 0, 1.0)

    def fused(self, x: torch.Tensor, e: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """x: (B, H·W, C), zero where no point is. Returns the same shape."""
        block, mask, channels = self.block, self.mask.flatten(2).transpose(1, 2), x.shape[2]
        first, second = Conditioning(block.modulated, z)(e)
        h = norm_modulate(x, block.norm1, first, plain=True) * mask
        image = h.view(self.batch, *self.size, channels).permute(0, 3, 1, 2)
        out = F.conv2d(image, block.kernel.to(h.dtype), padding=block.kernel.shape[-1] // 2, groups=channels)
        x = x + out.permute(0, 2, 3, 1).flatten(1, 2) / self.density.flatten(2).transpose(1, 2)
        return (x + block.mlp(norm_modulate(x, block.norm2, second, plain=True))) * mask

    def as_published(self, x: torch.Tensor, e: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), zero where no point is. Returns the same shape."""
        block, channels = self.block, x.shape[1]
        h = self._modulated(x, block.norm1, block.modulation1, e, z) * self.mask
        out = F.conv2d(h, block.kernel.to(h.dtype), padding=block.kernel.shape[-1] // 2, groups=channels)
        x = x + out / self.density
        h = self._modulated(x, block.norm2, block.modulation2, e, z)
        for layer in block.mlp:
            h = F.conv2d(h, layer.weight[:, :, None, None], layer.bias) if hasattr(layer, "weight") else layer(h)
        return (x + h) * self.mask

    @staticmethod
    def _modulated(x, norm, modulation, e, z):
        centred = x - x.mean(1, keepdim=True)
        variance = x.var(1, unbiased=False, keepdim=True)
        h = centred * (variance + norm.eps).rsqrt() * norm.weight[:, None, None]
        scale, shift = modulation.time(e)[:, :, None, None].chunk(2, dim=1)
        return (h * (1 + scale) + shift) * (1 + modulation.z(z)[:, :, None, None])


def at_points(x: torch.Tensor, points: Points) -> torch.Tensor:
    """Read features (B, H·W, C), or an image (B, C, H, W), at the points: (B, M, C)."""
    return gather_points(x if x.ndim == 4 else points_to_image(x, points.size), points)


def nearest_by_brute_force(points: Points, side: int, neighbours: int, device: torch.device) -> torch.Tensor:
    """Squared distances (B, U², K) of the nearest points of every node, from all distances, in chunks."""
    convention = CONVENTIONS["cell_centred"]
    axis = convention.pixel_coordinate(torch.arange(side, device=device), side)
    nodes = torch.cartesian_prod(axis, axis)
    rows, cols = points.rows_cols(device)
    where = torch.stack([convention.pixel_coordinate(v, n) for v, n in zip((rows, cols), points.size)], dim=2)
    found = []
    for item in where:
        chunks = nodes.split(max((1 << 24) // len(item), 1))
        found.append(torch.cat([_nearest(chunk, item, neighbours) for chunk in chunks]))
    return torch.stack(found)


def _nearest(nodes: torch.Tensor, where: torch.Tensor, neighbours: int) -> torch.Tensor:
    squared = (nodes[:, None] - where).square().sum(2)
    return squared.topk(neighbours, dim=1, largest=False).values


def nearest_by_tree(points: Points, side: int, neighbours: int) -> torch.Tensor:
    """The same from SciPy's k-d tree, one per image."""
    from scipy.spatial import cKDTree

    axis = (np.arange(side) + 0.5) / side
    nodes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=2).reshape(-1, 2)
    rows, cols = (v.numpy() for v in points.rows_cols())
    where = np.stack([(rows + 0.5) / points.size[0], (cols + 0.5) / points.size[1]], axis=2)
    found = [cKDTree(item).query(nodes, k=neighbours)[0] ** 2 for item in where]
    return torch.from_numpy(np.stack(found)).float()


def coordinates_on_the_host(batch: int, pixels: int, count: int, device: torch.device) -> torch.Tensor:
    """Points drawn image by image with NumPy's legacy generator, then copied, as the published code does."""
    drawn = [np.random.choice(pixels, count, replace=False) for _ in range(batch)]
    return torch.from_numpy(np.stack(drawn)).to(device)


def smoothing_by_cosine_transforms(mollifier, size: tuple[int, int], device: torch.device) -> Callable:
    """The mollifier as the published code applies it: cosine transform, product with the gains, and back."""
    transforms = [_cosine_matrix(n, device) for n in size]
    gain = mollifier.gain(size).to(device=device, dtype=torch.float32)

    def smooth(x: torch.Tensor) -> torch.Tensor:
        rows, cols = transforms
        return rows.T @ ((rows @ x @ cols.T) * gain) @ cols

    return smooth


def _cosine_matrix(n: int, device: torch.device) -> torch.Tensor:
    """The orthonormal DCT-II, (n, n)."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(torch.pi * k * (i + 0.5) / n) * (2 / n) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.float().to(device)
