"""Recomputed activations and compiled networks train as plain ones do."""

import contextlib
import functools

import pytest
import torch

import micro
from data.datasets import open_dataset
from runtime.precision import Precision
from training import acceleration
from training.acceleration import accelerate, compile_mode
from training.image_stage import ImageStage

CPU = torch.device("cpu")


def step(root, changes, during_forward=None):
    """The loss of a micro model on one batch and the gradient of every parameter."""
    config = micro.image(root, changes)
    torch.manual_seed(3)
    data = open_dataset(config.data, "train")
    stage = ImageStage(config, data, data, Precision(CPU, None))
    before = {name: list(module.state_dict()) for name, module in stage.modules.items()}
    accelerate(stage.modules, config.train, CPU)
    assert {name: list(module.state_dict()) for name, module in stage.modules.items()} == before
    for module in stage.modules.values():
        module.train()
    torch.manual_seed(4)  # of dropout
    with during_forward or contextlib.nullcontext():
        draws = stage.draw(torch.Generator().manual_seed(5), 4)
        loss, *_ = stage.loss(torch.stack([data[i] for i in range(4)]), draws)
    loss.backward()
    gradients = {f"{n}.{k}": p.grad for n, module in stage.modules.items() for k, p in module.named_parameters()}
    return loss, gradients


def test_recomputed_activations_give_the_same_bits(tmp_path):
    """Dropout included: the second pass draws what the first drew."""
    changes = {"model.uno_dropout": 0.5, "model.uno_dropout_from_resolution": 8}
    loss, gradients = step(tmp_path, changes)
    again, recomputed = step(tmp_path, {**changes, "train.recompute": True})
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_recomputing_keeps_less(tmp_path):
    kept = {}
    for recompute in (False, True):
        sizes = []

        def count(x, sizes=sizes):
            sizes.append(0 if isinstance(x, torch.nn.Parameter) else x.nbytes)  # parameters are there anyway
            return x

        counting = torch.autograd.graph.saved_tensors_hooks(count, lambda x: x)
        step(tmp_path, {"train.recompute": recompute}, counting)
        kept[recompute] = sum(sizes)
    assert kept[True] < 0.75 * kept[False]  # most of the rest are tables of points and weights, which stay


@pytest.mark.parametrize("recompute", [False, True])
def test_the_dense_part_compiles_as_one_graph(tmp_path, monkeypatch, recompute):
    """With a back end that runs the graph it is given, which is what fails to compile or not."""
    calls = []

    def whole(function, mode, dynamic):
        calls.append(mode)
        return compiler(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    compiler = torch.compile
    changes = {"model.uno_dropout": 0.0, "train.recompute": recompute}
    loss, gradients = step(tmp_path, changes)
    monkeypatch.setattr(torch, "compile", whole)
    again, compiled = step(tmp_path, {**changes, "train.compile": "max-autotune"})
    assert calls == ["max-autotune"] * 2
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)


def test_auto_compiles_on_a_gpu_alone(monkeypatch):
    functional = functools.partial(compile_mode, device=CPU)
    assert functional("auto") is None and functional("off") is None
    assert functional("reduce-overhead") == "reduce-overhead"
    for possible, mode in ((True, "default"), (False, None)):
        monkeypatch.setattr(acceleration, "available", lambda possible=possible: possible)
        assert compile_mode("auto", torch.device("cuda")) == mode
    assert compile_mode("off", torch.device("cuda")) is None
