"""Fourier layer of the grid U-Net: mixes the channels of the lowest frequencies, at the same, half or double size.

A grid of n nodes samples the unit interval at (j + ½)/n. A frequency keeps its wavelength, amplitude and phase
whatever the size it is read or written at, so a band-limited function at n nodes goes to the same function at n/2 or
2n. Letters: B batch, I/O input/output channels, H × W and H' × W' grids, m modes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

MODES = 4
SIZES: dict[str, Callable[[int], int]] = {
    "same": lambda n: n,
    "half": lambda n: (n + 1) // 2,  # as a 3×3 convolution of stride 2
    "double": lambda n: 2 * n,
}


class SpectralConv(nn.Module):
    """out(x) = Σ_κ W(κ) · x̂(κ) · exp(2πi κ·x) over |κ_row| < m or κ_row = −m, 0 ≤ κ_col < m, without bias.

    Frequencies that a grid involved cannot hold (Nyquist and beyond) are left out. resize: "same", "half" or "double".
    """

    def __init__(self, c_in: int, c_out: int, resize: str = "same", modes: int = MODES):
        super().__init__()
        if resize not in SIZES:
            raise ValueError(f"resize is {resize!r}; accepted: {', '.join(SIZES)}")
        self.resize, self.modes = resize, modes
        # As published: real and imaginary parts uniform in [0, 1/(I·O)]. Held as pairs of reals, which every optimiser,
        # average and file format handles. First axis: rows 0 … m−1, then rows −m … −1.
        self.weight = nn.Parameter(torch.rand(2, c_in, c_out, modes, modes, 2) / (c_in * c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, I). Returns (B, H', W', O)."""
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(dtype, torch.float32))
            size = x.shape[1:3]
            target = tuple(SIZES[self.resize](n) for n in size)
            weight = torch.view_as_complex(self.weight.to(x.dtype))  # (2, I, O, m, m)
            rows, row_weight = self._rows(min(size[0], target[0]), x.device)
            cols = torch.arange(min(self.modes, (min(size[1], target[1]) + 1) // 2), device=x.device)
            kernel = weight[row_weight[0], :, :, row_weight[1]][..., : len(cols)]  # (rows, I, O, cols)
            spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="forward")  # (B, H, W//2+1, I)
            spectrum = spectrum[:, rows % size[0]][:, :, cols]  # (B, rows, cols, I)
            mixed = torch.einsum("brci,rioc->brco", spectrum, kernel)
            shift = [(1 / new - 1 / old) / 2 for old, new in zip(size, target)]  # node 0 moves by this much
            turns = rows.to(x.dtype)[:, None] * shift[0] + cols.to(x.dtype) * shift[1]  # (rows, cols)
            mixed = mixed * torch.polar(torch.ones_like(turns), 2 * torch.pi * turns).unsqueeze(2)
            full = mixed.new_zeros(x.shape[0], target[0], target[1] // 2 + 1, mixed.shape[3])
            full[:, (rows % target[0])[:, None], cols] = mixed
            return torch.fft.irfft2(full, s=target, dim=(1, 2), norm="forward").to(dtype)  # (B, H', W', O)

    def _rows(self, n: int, device: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Row frequencies that a grid of n rows can hold, and for each the (half, mode) of its weight."""
        positive = torch.arange(min(self.modes, (n + 1) // 2), device=device)
        negative = torch.arange(-min(self.modes, (n - 1) // 2), 0, device=device)
        half = torch.cat([torch.zeros_like(positive), torch.ones_like(negative)])
        return torch.cat([positive, negative]), (half, torch.cat([positive, negative + self.modes]))
