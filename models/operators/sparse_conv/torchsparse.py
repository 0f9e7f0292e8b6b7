"""torchsparse: 2.1 convolves regularly, the fork of 2.0 by the paper's authors depthwise too.

Letters: C channels, N rows, K taps.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from diffusion.coordinates import Size
from models.operators.sparse_conv.library import LibraryBackend, LibraryPlan


@dataclass(frozen=True, kw_only=True)
class TorchSparseBackend(LibraryBackend):
    """See the module. The library is three-dimensional: pixels lie in the plane where the first coordinate is 0.

    batch_first: the coordinates are (image, 0, row, column), as from 2.1 on, else (0, row, column, image).
    """

    batch_first: bool

    name = "torchsparse"
    install = (
        "build it from https://github.com/mit-han-lab/torchsparse (regular convolutions) or "
        "https://github.com/samb-t/torchsparse (depthwise too)"
    )

    @classmethod
    def _open(cls) -> TorchSparseBackend:
        device_type = cls.require_cuda()  # before the import, which asks for a device's capability
        import torchsparse
        from torchsparse.nn import functional

        version = tuple(int(part) for part in torchsparse.__version__.split(".")[:2])
        depthwise = "depthwise" in inspect.signature(functional.conv3d).parameters
        return cls(device_type=device_type, depthwise=depthwise, batch_first=version >= (2, 1))

    def _geometry(self, coordinates: torch.Tensor, batch: int, size: Size, kernel_shape: Size) -> Any:
        import torchsparse

        image, pixel = coordinates[:, :1], coordinates[:, 1:]
        plane = torch.zeros_like(image)
        nothing = coordinates.new_empty(len(coordinates), 0)
        if self.batch_first:
            coords = torch.cat([image, plane, pixel], dim=1)
            return torchsparse.SparseTensor(feats=nothing, coords=coords, spatial_range=(batch, 1, *size))
        return torchsparse.SparseTensor(feats=nothing, coords=torch.cat([plane, pixel, image], dim=1))

    def _convolve(self, rows: torch.Tensor, kernel: torch.Tensor, plan: LibraryPlan, depthwise: bool) -> torch.Tensor:
        from torchsparse.nn import functional

        tensor = copy.copy(plan.geometry)  # shares the neighbours found by earlier calls, not the features
        tensor.feats = rows
        taps = kernel.permute(3, 2, 1, 0).flatten(0, 1)  # (K, C/groups, C_out), the row's offset running fastest
        options: dict[str, Any] = {}
        if self.batch_first:
            # The padding keeps the lattice's size. Training says that neighbours are needed for backward passes too:
            # the first call finds them for all, whether or not it has gradients itself.
            options = {"padding": (0, plan.kernel_shape[0] // 2, plan.kernel_shape[1] // 2), "training": True}
        if depthwise:
            options["depthwise"] = True
        return functional.conv3d(tensor, taps, (1, *plan.kernel_shape), **options).feats
