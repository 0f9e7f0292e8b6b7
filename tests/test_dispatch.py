"""Kernels in Triton are taken where they can be launched, and only there."""

import importlib.util
import logging
import shutil
import sysconfig

import pytest
import torch

from diffusion.coordinates import Points
from models.grid_unet import GridSpec
from models.operators import compiled, dispatch, triton_support
from models.operators.dispatch import kernels, use_backend
from models.sparse_unet import SparseSpec, SparseUNet


@pytest.fixture
def asked_anew():
    triton_support._missing.cache_clear()
    yield
    triton_support._missing.cache_clear()


@pytest.mark.parametrize("operation", sorted({operation for operation, _ in dispatch._KERNELS}))
def test_on_a_cpu_kernels_need_a_compiler(operation, monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert kernels(operation, "cpu") is None
    monkeypatch.setattr(compiled, "library", lambda: object())
    on_a_cpu = {"convolution", "nearest points", "transposition"}
    assert (kernels(operation, "cpu") is not None) == (operation in on_a_cpu)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_means_pytorch(device, monkeypatch):
    monkeypatch.setattr(triton_support, "available", lambda: True)
    for operation, _ in dispatch._KERNELS:
        assert kernels(operation, device, plain=True) is None


def test_taken_on_a_gpu(asked_anew, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")
    for (operation, device), module in dispatch._KERNELS.items():
        assert device != "cuda" or kernels(operation, "cuda").__name__ == f"models.operators.{module}"


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
        for operation, _ in dispatch._KERNELS:
            assert kernels(operation, "cuda") is None
    assert len(caplog.records) == 1
    assert {"package": "the package triton", "compiler": "a C compiler", "headers": "Python.h"}[lacking] in caplog.text


def test_one_switch_computes_everything_in_pytorch(monkeypatch):
    """With `model.backend=torch_dense` no network asks for kernels that it then may take."""
    asked = []
    known = dispatch.kernels

    def spy(operation, device_type, plain=False):
        asked.append((operation, plain))
        return known(operation, device_type, plain)

    monkeypatch.setattr(dispatch, "kernels", spy)
    for backend, plain in (("torch_dense", True), ("native", False)):
        asked.clear()
        network = SparseUNet(3, 3, (8, 6), SparseSpec(8, 1, 3), GridSpec(4, 4, (1,), (1,)), time_dim=8, z_dim=5)
        use_backend(network, backend)
        points = Points((8, 6), torch.randperm(48)[None, :20])
        network(torch.randn(1, 20, 3), points, torch.ones(1), torch.randn(1, 5)).sum().backward()
        others = set() if plain else {"convolution"}
        assert {operation for operation, _ in asked} == {"nearest points", "norm and MLP", "transposition"} | others
        assert all(told is plain for _, told in asked)
