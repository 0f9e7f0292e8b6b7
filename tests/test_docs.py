"""What docs/ and examples/ show runs, in order, with small untrained weights in place of trained ones."""

import json
import re
from pathlib import Path

import pytest

from infty_diff import InftyDiff, SamplingOptions
from runtime import saved
from test_generation import build

ROOT = Path(__file__).parents[1]
NAMES = ("landscapes-32",)  # the models that the texts load
SIZE = {"data.img_size": 32, "data.img_width": 32}
PAGES = [path for path in sorted(ROOT.glob("docs/*.md")) if "```python" in path.read_text()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A folder in the place of weights/."""
    root = tmp_path_factory.mktemp("weights")
    for name in NAMES:
        model = build(root / "runs", SIZE | {"data.num_images": 200})
        model.sampling = SamplingOptions(steps=5)
        model.save(root / name)
    return root


def blocks(page: Path) -> list[str]:
    """The Python code of a page, each at its lines, so that tracebacks point there."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "FOLDER", weights)
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "session"}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), session)
    if page.name == "python.md":
        assert (tmp_path / "sample.png").exists() and isinstance(session["model"], InftyDiff)
        assert session["finer"].shape == (2, 3, 48, 48) and session["way"].shape[0] == 5
        assert session["trained"].config == session["stage"].config


def test_there_is_a_page():
    assert "python.md" in {page.name for page in PAGES} and len(blocks(ROOT / "docs/python.md")) >= 9


NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_the_notebook_runs(weights):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = f"import runtime.saved, pathlib\nruntime.saved.FOLDER = pathlib.Path({str(weights)!r})"
    notebook.cells.insert(2, nbformat.v4.new_code_cell(place))  # after the cell that finds the clone
    path = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=path).execute()
    assert sum(shows_picture(cell) for cell in notebook.cells) >= 8


def test_the_notebook_keeps_its_pictures():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(map(shows_picture, cells)) >= 8 and NOTEBOOK.stat().st_size < 1e6
    assert not any(output["output_type"] in ("error", "stream") for cell in cells for output in cell["outputs"])


def shows_picture(cell: dict) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
