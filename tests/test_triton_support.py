"""Kernels in Triton are taken where they can be launched, and only there."""

import importlib.util
import logging
import shutil
import sysconfig

import pytest

from models import triton_support

NAME = "models.operators.native.triton_conv"


@pytest.fixture
def asked_anew():
    for function in (triton_support.kernels_for, triton_support._missing):
        function.cache_clear()
    yield
    for function in (triton_support.kernels_for, triton_support._missing):
        function.cache_clear()


def test_never_on_a_cpu(asked_anew):
    assert triton_support.kernels_for("cpu", NAME) is None


def test_taken_on_a_gpu(asked_anew, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")
    assert triton_support.can_compile()
    assert triton_support.kernels_for("cuda", NAME).__name__ == NAME


@pytest.mark.parametrize("lacking", ["package", "compiler", "headers"])
def test_what_is_missing_is_said_once(asked_anew, tmp_path, monkeypatch, caplog, lacking):
    (tmp_path / "Python.h").touch()
    if lacking == "package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None if lacking == "compiler" else f"/usr/bin/{name}")
    folder = tmp_path / "nowhere" if lacking == "headers" else tmp_path
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(folder)})
    with caplog.at_level(logging.WARNING):
        for name in (NAME, "models.triton_neighbours", NAME):
            assert triton_support.kernels_for("cuda", name) is None
        assert not triton_support.can_compile()
    assert len(caplog.records) == 1
    assert {"package": "the package triton", "compiler": "a C compiler", "headers": "Python.h"}[lacking] in caplog.text
