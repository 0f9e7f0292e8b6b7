"""Which steps of the optimiser are left out, decided and counted on the device."""

from __future__ import annotations

import torch

from configs.schema import OptimizerConfig


class StepGuard:
    """Leaves out steps whose gradient norm is not finite, and with `optimizer.gradient_skip` those where it is large.

    Nothing waits for the device but `read`. Processes that train together have one norm, hence one decision.
    """

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self._limit = config.gradient_skip_threshold if config.gradient_skip else torch.inf
        # Steps left out; and how many, up to the last, in a row for a norm that is not finite.
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    def skips(self, norm: torch.Tensor) -> torch.Tensor:
        """Whether the step with this gradient norm () is left out, bool (); it is counted."""
        finite = norm.isfinite()
        skip = ~(finite & (norm < self._limit))
        left_out, row = self._counts.unbind()
        self._counts = torch.stack([left_out + skip, torch.where(finite, 0, row + 1)])
        return skip

    def read(self) -> tuple[int, int]:
        """Steps left out since `clear`, and of the last ones how many for a norm that is not finite; waits."""
        left_out, row = self._counts.tolist()
        return left_out, row

    def clear(self) -> None:
        """Begin to count anew; a row goes on."""
        row = self._counts[1]
        self._counts = torch.stack([torch.zeros_like(row), row])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"counts": self._counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._counts = state["counts"]
