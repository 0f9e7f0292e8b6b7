"""WarpConvNet 1.8: regular and depthwise convolutions on CUDA devices.

Letters: C channels, N rows, K taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffusion.coordinates import Size
from models.operators.sparse_conv.library import LibraryBackend, LibraryPlan


@dataclass(frozen=True, kw_only=True)
class WarpConvNetBackend(LibraryBackend):
    """See the module. Its algorithms are left to its own choice, by timing each once per shape."""

    name = "warpconvnet"
    install = "pip install warpconvnet torch-scatter (both compile with nvcc; or take their wheels for your PyTorch)"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    @classmethod
    def _open(cls) -> WarpConvNetBackend:
        return cls(device_type=cls.require_cuda(), depthwise=True)

    def _geometry(self, coordinates: torch.Tensor, batch: int, size: Size, extent: Size) -> Any:
        from warpconvnet.geometry.types.voxels import Voxels
        from warpconvnet.nn.functional.sparse_conv import generate_output_coords_and_kernel_map

        first = torch.arange(batch + 1) * (len(coordinates) // batch)  # row of each image's first point
        nothing = coordinates.new_empty(len(coordinates), 1, dtype=torch.float32)
        voxels = Voxels(coordinates[:, 1:].contiguous(), nothing, offsets=first)
        generate_output_coords_and_kernel_map(voxels, extent, (1, 1), (1, 1))  # kept by the voxels
        return voxels

    def _convolve(self, rows: torch.Tensor, kernel: torch.Tensor, plan: LibraryPlan, depthwise: bool) -> torch.Tensor:
        from warpconvnet.nn.functional.sparse_conv import generate_output_coords_and_kernel_map, spatially_sparse_conv
        from warpconvnet.nn.functional.sparse_conv_depth import spatially_sparse_depthwise_conv

        taps = kernel.permute(2, 3, 1, 0).flatten(0, 1)  # (K, C/groups, C_out), the column's offset running fastest
        if depthwise:
            _, _, neighbours = generate_output_coords_and_kernel_map(plan.geometry, plan.extent, (1, 1), (1, 1))
            return spatially_sparse_depthwise_conv(rows, taps.squeeze(1), neighbours, len(rows))
        voxels = plan.geometry.replace(batched_features=rows)
        choice = dict.fromkeys(("fwd_algo", "dgrad_algo", "wgrad_algo"), "auto")
        return spatially_sparse_conv(voxels, taps, plan.extent, use_fp16_accum=False, **choice).feature_tensor
