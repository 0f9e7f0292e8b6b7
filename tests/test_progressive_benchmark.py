"""The benchmark of samplers whose lattice grows: its command in quick mode, on small weights."""

import json

import pytest

from benchmarks.progressive import GROWING
from forked import run
from test_generation import build


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return build(root, {"data.num_images": 100}).save(root / "micro")


def test_quick_mode_compares_all_ways(weights, tmp_path):
    path = tmp_path / "rows.json"
    done = run(["benchmarks/progressive.py", f"--model={weights}", "--device=cpu", "--quick", f"--json={path}"])
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {"date", "commit", "device", "threads", "model", "factor", "images", "extractor", "metric"} <= set(result)
    first, *rows = result["rows"]
    assert [first["way"], *(row["way"] for row in rows)] == ["ddim", *GROWING]
    assert first["evaluated"] == 1 and all(row["evaluated"] < 1 for row in rows)
    for row in result["rows"]:
        assert row["seconds"] > 0 and row["distance"] > 0 and 0 < row["drift"] < 1 and row["way"] in done.stdout


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--images=1", "--images is 1; accepted: whole numbers from 2"), ("--model=none-such", "none-such is no run"),
     ("--json=/no/such/folder/x.json", "accepted: a file in a folder that exists")],
)  # fmt: skip
def test_bad_input_is_one_line(argument, said):
    done = run(["benchmarks/progressive.py", argument])
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
