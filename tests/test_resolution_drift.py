"""The benchmark of drift between sizes: its command, and its numbers against closed forms."""

import json
import subprocess

import pytest
import torch

from benchmarks.resolution_drift import WAYS, gain_changes, way_of
from diffusion.coordinates import CONVENTIONS
from forked import run
from models.grid_unet import GridSpec
from models.sparse_unet import SparseSpec, SparseUNet


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return run(["benchmarks/resolution_drift.py", *arguments])


def test_quick_mode_compares_both_ways_at_every_size(tmp_path):
    path = tmp_path / "rows.json"
    done = run_command("--quick", f"--json={path}")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {"date", "commit", "device", "torch", "threads", "models", "training_steps", "sampling_steps"} <= set(result)
    assert [row["size"] for row in result["rows"]] == [16, 32, 48]
    for row in result["rows"]:
        assert "{0}x{0}".format(row["size"]) in done.stdout
        for way in WAYS:
            numbers = {column: number for column, (number,) in row[way].items()}
            training = row["size"] == result["train_size"]
            assert (numbers["drift"] == 0) == training and (numbers["border"] == 0) == training
            assert 0 <= numbers["drift"] < 2 and numbers["thinned"] > 0
        assert row["overlap"]["inside"][0] < 1e-5


def test_a_missing_folder_is_refused():
    done = run_command("--quick", "--json=/no/such/folder/x.json")
    assert done.returncode == 2 and "accepted: a file in a folder that exists" in done.stderr
    assert "Traceback" not in done.stderr


def test_ways_differ_in_the_gain_of_constants():
    """A kernel of one tap of 3 × 3 in the middle: at twice the size its bilinear copy has other sums, its cells not."""
    network = SparseUNet(1, 1, (16, 16), SparseSpec(1, 1, 3), GridSpec(4, 4, (1,), (1,)), time_dim=4)
    with torch.no_grad():
        network.down_blocks[0].kernel.zero_()[0, 0, 1, 1] = 1
    before = CONVENTIONS["cell_centred"]
    found = {}
    for way in WAYS:
        with way_of(way):
            found[way] = gain_changes(network, [16, 32])
    assert CONVENTIONS["cell_centred"] is before
    assert found["overlap"][1]["inside"] < 1e-6
    # Bilinear: 5 × 5 taps with the sum of an axis squared, and 9 / 25 for the density.
    bilinear = torch.nn.functional.interpolate(torch.eye(3)[1].view(1, 1, 3), size=5, mode="linear").sum().item()
    assert found["published"][1]["inside"] == pytest.approx(abs(bilinear**2 * 9 / 25 - 1), rel=1e-5)
    assert found["published"][0]["inside"] == found["overlap"][0]["inside"] == 0
