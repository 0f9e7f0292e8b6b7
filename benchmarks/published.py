"""A training step as the published code computes it, expressed with the modules and weights of this repository.

Features are images of whole grids with zeros where no point is. Norms are elementary operations, pointwise layers
1 × 1 convolutions, and the nearest points come from all distances. NumPy draws the coordinates, image by image. Adam
and EMA go parameter by parameter. In the convention `reference` the networks give the numbers of `SparseUNet` and
`SparseEncoder`.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines import coordinates_on_the_host, smoothing_by_cosine_transforms
from data.pixels import to_float
from models.grid_unet import GridBlock, GridTrunk, GridUNet
from models.layers import Attention, sinusoidal_features
from models.modulation import Modulation
from models.sparse_block import SparseBlock
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseDescent, SparseUNet
from training.image_stage import ImageStage

_DISTANCES = 1 << 31  # computed at once: 8 GiB

Condition = tuple[torch.Tensor | None, torch.Tensor | None]  # time (B, time_dim) and latent (B, D)


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    """LayerNorm over the channels of an image (B, C, H, W)."""
    centred, variance = x - x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    affine = (t[None, :, None, None] for t in (layer.weight, layer.bias))
    h = centred * (variance + layer.eps).rsqrt() * next(affine)
    return h + next(affine)


def modulated(x: torch.Tensor, layer: nn.LayerNorm, modulation: Modulation, condition: Condition) -> torch.Tensor:
    h = norm(x, layer)
    e, z = condition
    if modulation.time is not None:
        scale, shift = modulation.time(e)[:, :, None, None].chunk(2, dim=1)
        h = h * (1 + scale) + shift
    return h if modulation.z is None else h * (1 + modulation.z(z)[:, :, None, None])


def pointwise(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """A linear layer on the channels of an image."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def sparse_block(
    block: SparseBlock,
    x: torch.Tensor,
    mask: torch.Tensor,
    density: torch.Tensor,
    condition: Condition,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """x, skip: (B, C, H, W). mask: (B, 1, H, W), one where a point is. density: like mask, one where none is."""
    if skip is not None:
        x = pointwise(torch.cat([x, skip], dim=1), block.skip) * mask
    h = modulated(x, block.norm1, block.modulation1, condition) * mask
    x = x + F.conv2d(h, block.kernel, padding=block.kernel.shape[-1] // 2, groups=block.groups) / density
    h = modulated(x, block.norm2, block.modulation2, condition)
    h = pointwise(F.gelu(pointwise(h, block.mlp[0])), block.mlp[2])
    return (x + h) * mask


def convolved(x: torch.Tensor, layer: nn.Conv2d | nn.ConvTranspose2d) -> torch.Tensor:
    convolve = F.conv_transpose2d if isinstance(layer, nn.ConvTranspose2d) else F.conv2d
    return convolve(x, layer.weight, layer.bias, layer.stride, layer.padding)


def grid_block(block: GridBlock, x: torch.Tensor, condition: Condition) -> torch.Tensor:
    h = convolved(F.gelu(norm(x, block.norm_in)), block.conv_in)
    h = F.gelu(modulated(h, block.norm_out, block.modulation, condition))
    h = convolved(F.dropout(h, block.dropout.p, block.training), block.conv_out)
    return h + (x if isinstance(block.shortcut, nn.Identity) else pointwise(x, block.shortcut))


def attended(x: torch.Tensor, layer: Attention | nn.Identity) -> torch.Tensor:
    """Attention on an image, which goes there and back as a sequence."""
    if isinstance(layer, nn.Identity):
        return x
    out = layer(x.permute(0, 2, 3, 1).contiguous()) - x.permute(0, 2, 3, 1)
    return x + out.permute(0, 3, 1, 2)


def grid_trunk(trunk: GridTrunk, x: torch.Tensor, condition: Condition) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x, skips = pointwise(x, trunk.fc0), []
    for level in trunk.downs:
        for block, attention in zip(level.blocks, level.attentions):
            x = attended(grid_block(block, x, condition), attention)
            skips.append(x)
        x = convolved(x, level.resample)
    x = attended(grid_block(trunk.mid_block1, x, condition), trunk.mid_attention)
    return grid_block(trunk.mid_block2, x, condition), skips


def grid_unet(unet: GridUNet, x: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The U-Net on an image (B, C, H, W)."""
    x, skips = grid_trunk(unet, x, condition)
    for level in unet.ups:
        for block, attention in zip(level.blocks, level.attentions):
            x = attended(grid_block(block, torch.cat([x, skips.pop()], dim=1), condition), attention)
        x = convolved(x, level.resample)
    return pointwise(F.gelu(pointwise(x, unet.fc1)), unet.fc2)


class Lattice:
    """Points as a mask of a lattice, and their coordinates with end points.

    size: (H, W). index: int64 (B, M). kernel_size: k of the density.
    """

    def __init__(self, size: tuple[int, int], index: torch.Tensor, kernel_size: int) -> None:
        self.size, self.index, self.batch = size, index, len(index)
        axes = [torch.linspace(0, 1, n, device=index.device) for n in size]
        lattice = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=2).flatten(0, 1)  # (HW, 2)
        self.coordinates = lattice.expand(self.batch, -1, -1).gather(1, index.unsqueeze(2).expand(-1, -1, 2))
        self.mask = self.scatter(torch.ones(*index.shape, 1, device=index.device))
        window = torch.full((1, 1, kernel_size, kernel_size), 1 / kernel_size**2, device=index.device)
        density = F.conv2d(self.mask, window, padding=kernel_size // 2)
        self.density = density.where(density > 1e-5, 1.0)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Features (B, M, C) to an image (B, C, H, W)."""
        image = x.new_zeros(self.batch, self.size[0] * self.size[1], x.shape[2])
        image = image.scatter(1, self.index.unsqueeze(2).expand_as(x), x)
        return image.unflatten(1, self.size).permute(0, 3, 1, 2)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """An image (B, C, H, W) to features (B, M, C)."""
        return x.flatten(2).transpose(1, 2).gather(1, self.index.unsqueeze(2).expand(-1, -1, x.shape[1]))

    def to_grid(self, x: torch.Tensor, side: int, neighbours: int) -> torch.Tensor:
        """Features (B, M, C) to an image (B, C, side, side): mean of the nearest points by inverse squared distance."""
        axis = torch.linspace(0, 1, side, dtype=self.coordinates.dtype, device=x.device)
        nodes = torch.cartesian_prod(axis, axis).split(max(_DISTANCES // self.coordinates[..., 0].numel(), 1))
        with torch.no_grad():
            found = [torch.cdist(part.expand(self.batch, -1, -1), self.coordinates) for part in nodes]
            distances, nearest = (torch.cat(t, 1) for t in zip(*(d.topk(neighbours, 2, largest=False) for d in found)))
            weights = 1 / distances.square().clamp(min=1e-16).unsqueeze(3)  # (B, Q, K, 1)
        index = nearest.flatten(1).unsqueeze(2).expand(-1, -1, x.shape[2])
        out = (x.gather(1, index).unflatten(1, nearest.shape[1:]) * weights).sum(2) / weights.sum(2)
        return out.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def descend(network: SparseDescent, x: torch.Tensor, lattice: Lattice, condition: Condition):
    """x: (B, M, C). The outputs of the blocks, and the image of the grid."""
    h, skips = lattice.scatter(network.linear_in(x)), []
    for block in network.down_blocks:
        h = sparse_block(block, h, lattice.mask, lattice.density, condition)
        skips.append(h)
    h = network.to_grid(lattice.gather(h))
    return skips, lattice.to_grid(h, network.grid_spec.resolution, network.sparse_spec.nearest)


def encode(network: SparseEncoder, x: torch.Tensor, lattice: Lattice) -> torch.Tensor:
    """The latent (B, D) of functions x (B, M, C)."""
    _, grid = descend(network, x, lattice, (None, None))
    h, _ = grid_trunk(network.grid, grid, (None, None))
    return network.linear_out(pointwise(h, network.grid.fc1).mean((2, 3)))


def denoise(network: SparseUNet, x: torch.Tensor, lattice: Lattice, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The prediction (B, M, C) for x (B, M, C)."""
    features = sinusoidal_features(t, network.time_dim).to(x.dtype)
    condition = (network.time_mlp(features), z)
    skips, grid = descend(network, x, lattice, condition)
    grid = grid_unet(network.grid, grid, condition)
    read = F.grid_sample(grid, lattice.coordinates.unsqueeze(2), mode="bilinear", align_corners=False)  # (B, C, M, 1)
    h = lattice.scatter(network.from_grid(read.squeeze(3).transpose(1, 2)))
    for block in network.up_blocks:
        h = sparse_block(block, h, lattice.mask, lattice.density, condition, skips.pop())
    return network.linear_out(lattice.gather(h))


class PublishedStep:
    """Steps of copies of a stage's networks.

    stage: of depthwise, linear kernels and a convolutional grid, which predicts T ξ. count: points of each image.
    """

    def __init__(self, stage: ImageStage, count: int) -> None:
        self.stage, self.count = stage, count
        copies = {name: copy.deepcopy(module) for name, module in stage.modules.items()}
        self.modules = {name: m.to(memory_format=torch.contiguous_format) for name, m in copies.items()}
        self.average = copy.deepcopy(self.modules["denoiser"])
        optimizer, parameters = stage.config.optimizer, [p for m in self.modules.values() for p in m.parameters()]
        betas = (optimizer.adam_beta1, optimizer.adam_beta2)
        self.optimizer = torch.optim.Adam(parameters, lr=optimizer.learning_rate, betas=betas)
        self.smooth = smoothing_by_cosine_transforms(stage.process.mollifier, stage.config.size, stage.device)

    def __call__(self, images: torch.Tensor, number: int) -> float:
        """Step `number` on uint8 images (B, C, H, W); the loss."""
        config, schedule, device = self.stage.config, self.stage.process.schedule, self.stage.device
        x_0 = to_float(images.to(device))
        t = torch.from_numpy(np.random.choice(schedule.num_steps, len(x_0))).to(device)
        seen, encoded = self._draw(len(x_0)), self._draw(len(x_0))
        signal, noise = schedule.at("sqrt_alpha_bar", t, x_0), schedule.at("sqrt_one_minus_alpha_bar", t, x_0)
        white = torch.randn_like(x_0)
        x_t, target = self.smooth(signal * x_0 + noise * white), self.smooth(white)
        with torch.autocast(device.type, enabled=self.stage.precision.dtype is not None):
            z = encode(self.modules["encoder"], encoded.gather(x_0), encoded)
            output = denoise(self.modules["denoiser"], seen.gather(x_t), seen, schedule.network_time(t), z)
        loss = (output - seen.gather(target)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        for module in self.modules.values():
            nn.utils.clip_grad_norm_(module.parameters(), config.train.gradient_clip)
        self.optimizer.step()
        if (number + 1) % config.train.ema_update_every == 0:
            for average, current in zip(self.average.parameters(), self.modules["denoiser"].parameters()):
                average.data.mul_(config.train.ema_decay)
                average.data.add_(current.data * (1 - config.train.ema_decay))
        return loss.item()

    def _draw(self, batch: int) -> Lattice:
        size = self.stage.config.size
        index = coordinates_on_the_host(batch, size[0] * size[1], self.count, self.stage.device)
        return Lattice(size, index, self.stage.config.model.kernel_size)
