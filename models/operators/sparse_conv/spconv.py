"""spconv 2: regular submanifold convolutions; it has no groups, hence no depthwise ones.

Its CPU wheel computes results but no gradients. Letters: C channels, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusion.coordinates import Size
from models.operators.sparse_conv.library import LibraryBackend, LibraryPlan


@dataclass(frozen=True, kw_only=True)
class SpconvBackend(LibraryBackend):
    """See the module. Calls what SubMConv2d does for kernels of more than 32 taps: gather, multiply, scatter by tap."""

    name = "spconv"
    install = "pip install spconv-cu126 (or that of your CUDA version; plain spconv is for CPUs, without gradients)"

    @classmethod
    def _open(cls) -> SpconvBackend:
        from spconv.cppconstants import CPU_ONLY_BUILD

        device_type = "cpu" if CPU_ONLY_BUILD else cls.require_cuda()
        return cls(device_type=device_type, depthwise=False, gradients=not CPU_ONLY_BUILD)

    def _geometry(
        self, coordinates: torch.Tensor, batch: int, size: Size, kernel_shape: Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of rows by tap, and their number by tap."""
        from spconv.core import ConvAlgo
        from spconv.pytorch import ops

        once = [1, 1]
        _, pairs, counts = ops.get_indice_pairs(
            coordinates.contiguous(),
            batch,
            list(size),
            ConvAlgo.Native,
            ksize=list(kernel_shape),
            stride=once,
            padding=[0, 0],
            dilation=once,
            out_padding=[0, 0],
            subm=True,
        )
        return pairs, counts

    def _convolve(self, rows: torch.Tensor, kernel: torch.Tensor, plan: LibraryPlan, depthwise: bool) -> torch.Tensor:
        from spconv.core import ConvAlgo
        from spconv.pytorch import functional

        pairs, counts = plan.geometry
        kernel = kernel.permute(0, 2, 3, 1).contiguous()  # (C_out, k'_h, k'_w, C)
        return functional.indice_subm_conv(rows, kernel, pairs, counts, len(rows), ConvAlgo.Native)
