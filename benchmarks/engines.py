"""The engines of the native back end beside each other, by which the rule that chooses one is to be checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from diffusion.coordinates import Points
from models.operators.sparse_conv.native import NativeBackend, engines
from models.operators.sparse_conv.torch_dense import TorchDenseBackend


def engine_calls(
    points: Points, x: torch.Tensor, kernel_size: int, backward: bool
) -> tuple[Callable[[int], list[torch.Tensor]], dict[str, Callable[[int], list[torch.Tensor]]], float]:
    """A depthwise convolution by the engine that is chosen, by each that can compute it, and the largest error of all.

    points: of the training resolution. x: (B, M, C). backward: with both gradients, else without any. Errors are
    relative to the largest value in float64.
    """
    (batch, _, channels), native, dense = x.shape, NativeBackend(), TorchDenseBackend()
    setting = (points, batch, (kernel_size, kernel_size), kernel_size, x.device)
    plan = native.plan(*setting)
    x = x.detach().requires_grad_(backward)
    weight = torch.randn(channels, 1, kernel_size, kernel_size, device=x.device, requires_grad=backward)
    gradient = torch.randn_like(x)

    def results(conv: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
        with contextlib.nullcontext() if backward else torch.no_grad():
            out = conv(*inputs)
            return [out, *torch.autograd.grad(out, inputs, gradient.to(out.dtype))] if backward else [out]

    with contextlib.nullcontext() if backward else torch.no_grad():
        possible = engines(x, weight, plan, channels)
    calls = {
        name: lambda _, engine=engine: results(lambda x, w: native.conv_by(engine, x, w, plan, channels), x, weight)
        for name, engine in possible.items()
    }

    def chosen(_: int) -> list[torch.Tensor]:
        return results(lambda x, w: native.conv(x, w, plan, channels), x, weight)

    exact_plan = dense.plan(*setting)
    exact = [t.detach().double().requires_grad_(backward) for t in (x, weight)]
    expected = results(lambda x, w: dense.conv(x, w, exact_plan, channels), *exact)
    errors = [
        ((a.double() - b).abs().max() / b.abs().max()).item()
        for call in (chosen, *calls.values())
        for a, b in zip(call(0), expected)
    ]
    return chosen, calls, max(errors)
