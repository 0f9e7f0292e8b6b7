"""What the project writes: whole or not at all, and JSON as the standard has it."""

import ast
import json
import math

import pytest

from runtime.files import plain, to_json, write_json
from test_diffusion_random import ROOT, sources
from test_divergence import strict


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    content = {"a": [1.0, math.nan, (math.inf, -math.inf)], "b": {"c": 2, "d": True, "e": None, "f": "NaN"}}
    expected = {"a": [1.0, None, [None, None]], "b": {"c": 2, "d": True, "e": None, "f": "NaN"}}
    assert strict(to_json(content)) == expected == plain(content)
    write_json(tmp_path / "result.json", content)
    assert strict((tmp_path / "result.json").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_what_is_no_json_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_all_json_is_written_strictly():
    """Digests and the command line, which cannot use `runtime.files`, ask for strictness themselves."""
    calls = 0
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump", "dumps", "dump"):
                strictness = [ast.unparse(k.value) for k in node.keywords if k.arg == "allow_nan"]
                assert strictness == ["False"], f"{file.relative_to(ROOT)}:{node.lineno}"
                calls += 1
    assert calls >= 2
