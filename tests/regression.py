"""Numbers kept beside the tests: what they are made from, compared and written with."""

import json
from pathlib import Path

import pytest
import torch


def waves(*shape: int, phase: float) -> torch.Tensor:
    """Numbers in [−1, 1] that depend on no generator."""
    count = torch.Size(shape).numel()
    return torch.cos(0.7 * torch.arange(count, dtype=torch.float64) ** 1.3 + phase).float().view(shape)


def compare(file: Path, found: dict[str, torch.Tensor], tolerance: float) -> None:
    """Assert that the results are those kept in `file`, to `tolerance` relative to the largest of each."""
    kept = json.loads(file.read_text())
    assert set(kept) == set(found)
    for name, values in kept.items():
        allowed = tolerance * max(map(abs, values))
        assert found[name].flatten().tolist() == pytest.approx(values, rel=0, abs=allowed), name


def keep(file: Path, found: dict[str, torch.Tensor]) -> None:
    """Write the results to `file` with seven digits."""
    rounded = {name: [float(f"{v:.7g}") for v in value.flatten().tolist()] for name, value in found.items()}
    file.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rounded.items()) + "\n}\n")
