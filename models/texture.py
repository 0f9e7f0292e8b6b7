"""Statistics of texture: what stripes and grain look like, wherever they lie.

Letters: B batch, C channels, H × W grid.
"""

import torch
import torch.nn.functional as F
from torch import nn

_REACH = 4  # cells: the largest shift
_SHIFTS = [(dy, dx) for dy in range(_REACH + 1) for dx in range(-_REACH, _REACH + 1) if dy > 0 or dx > 0]


def local_contrast(x: torch.Tensor, radius: int = 1, floor: float = 0.02) -> torch.Tensor:
    """Deviations from the local mean, relative to their local size (Jarrett et al. 2009, section 2.2).

    c = d / √(mean(d²) + floor²) with d = x − mean(x); means are over the (2·radius+1)² cells around, or those of them
    that there are.

    x: (B, H, W, C). floor: what is fainter than this stays faint. Returns (B, H, W, C).
    """

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(values, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)

    x = x.permute(0, 3, 1, 2)  # (B, C, H, W)
    d = x - mean(x)
    return (d * torch.rsqrt(mean(d.square()) + floor**2)).permute(0, 2, 3, 1)


def autocorrelation(x: torch.Tensor, windows: tuple[int, int]) -> torch.Tensor:
    """Means of x(p)·x(p + s) over channels and over the places p of a window, for shifts s of up to 4 cells.

    A stripe shows as a wave in s: its direction and spacing, without its phase and colour. Outside the grid x is 0; of
    the shifts s and −s there is one.

    x: (B, H, W, C). windows: rows and columns of windows that the grid is cut into. Returns (B, 40, *windows).
    """
    x = x.permute(0, 3, 1, 2)  # (B, C, H, W)
    height, width = x.shape[2:]
    padded = F.pad(x, (_REACH, _REACH, 0, _REACH))
    maps = [
        (x * padded[:, :, dy : dy + height, dx + _REACH : dx + _REACH + width]).mean(1)  # (B, H, W)
        for dy, dx in _SHIFTS
    ]
    return F.adaptive_avg_pool2d(torch.stack(maps, 1), windows)


class TextureCode(nn.Linear):
    """What texture adds to a latent: linear in the autocorrelation of the local contrast.

    An encoder of convolutions hardly sees faint texture beside large differences of colour: its norms divide by those.

    windows: as for `autocorrelation`. z_dim: D.
    """

    def __init__(self, windows: tuple[int, int], z_dim: int):
        if len(windows) != 2:
            raise ValueError(f"model.encoder_texture is {windows}; accepted: () or two numbers, rows and columns")
        super().__init__(len(_SHIFTS) * windows[0] * windows[1], z_dim, bias=False)
        self.windows = windows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, H, W, C), the function on the grid. Returns (B, D)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision would round faint contrast
        features = autocorrelation(local_contrast(x), self.windows)
        return super().forward(features.flatten(1).to(self.weight.dtype))
