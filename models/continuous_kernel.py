"""A convolution kernel that is a function: a small network of the offset (paper, section 5, discretisation invariance).

Letters: k kernel side at the training resolution, k' at the resolution in use, H × W lattice.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from diffusion.coordinates import Size
from models.operators.sparse_conv.backend import Span, coverage

_WIDTH = 32  # of the hidden layers


class _Sine(nn.Linear):
    """sin(W·x + b), with b anywhere in a period."""

    def __init__(self, c_in: int, c_out: int, bound: float):
        super().__init__(c_in, c_out)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -math.pi, math.pi)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(super().forward(x))


class ContinuousKernel(nn.Module):
    """κ(u) of eq. (20), one number per pair of channels: Linear(sin(Linear(sin(Linear(u))))).

    u is the offset in the unit square divided by half the window, k/(2·n_train) per axis, so that the window is
    [−1, 1]² on every lattice: the kernel is evaluated where the pixels are, never resampled. At initialisation the
    values are spread as those of a table of k × k weights, and no frequency of the first layer exceeds what the k taps
    of the training resolution can hold.

    shape: (C_out, C_in/groups). kernel_size: k. train_size: lattice to which k refers. bound: of the uniform
    distribution from which a table would be drawn.
    """

    def __init__(self, shape: tuple[int, int], kernel_size: int, train_size: Size, bound: float):
        super().__init__()
        self.shape, self.kernel_size, self.train_size = tuple(shape), kernel_size, tuple(train_size)
        nyquist = math.pi * kernel_size / 2  # radians per unit of u
        self.layers = nn.Sequential(
            _Sine(2, _WIDTH, nyquist),
            _Sine(_WIDTH, _WIDTH, math.sqrt(6 / _WIDTH)),  # phases of variance one
            nn.Linear(_WIDTH, math.prod(self.shape)),
        )
        # A sine of a uniform phase has the variance 1/2: the sum over the width then has that of the table.
        nn.init.uniform_(self.layers[2].weight, -bound * math.sqrt(2 / _WIDTH), bound * math.sqrt(2 / _WIDTH))
        nn.init.zeros_(self.layers[2].bias)

    def forward(self, size: Size, kernel_shape: Size, span: Span | None = None) -> torch.Tensor:
        """Weights (C_out, C_in/groups, k'_h, k'_w) at the offsets of a window of k'_h × k'_w pixels of a lattice.

        With a span, each is multiplied by the fraction of its pixel's cell that is in the window. The density counts
        the same. A pixel whose centre is outside has the value at the edge.
        """
        device = self.layers[2].weight.device
        axes = [self._offsets(axis, size, kernel_shape, device) for axis in (0, 1)]
        u = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=2).to(self.layers[2].weight.dtype)  # (k'_h, k'_w, 2)
        with torch.autocast(device.type, enabled=False):  # phases lose their meaning at half precision
            weights = self.layers(u.clamp(-1, 1)).permute(2, 0, 1).unflatten(0, self.shape)
            return weights if span is None else weights * coverage(kernel_shape, span, device).to(weights.dtype)

    def _offsets(self, axis: int, size: Size, kernel_shape: Size, device: torch.device) -> torch.Tensor:
        pixels = torch.arange(kernel_shape[axis], device=device) - kernel_shape[axis] // 2
        return pixels * (2 * self.train_size[axis] / (self.kernel_size * size[axis]))
