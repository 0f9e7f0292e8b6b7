"""The comparisons of benchmarks/operators.py: what is called, on which data, once results have been checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import baselines
from benchmarks.engines import engine_calls
from diffusion.coordinates import CONVENTIONS, Points, scatter_points
from diffusion.mollifier import Mollifier
from diffusion.random import Purpose, stream
from diffusion.subsets import draw_points
from models.modulation import Conditioning
from models.operators.dispatch import get_backend, use_backend
from models.operators.knn.search import nearest_points
from models.sparse_block import SparseBlock

K, NEIGHBOURS, CONDITION = 7, 3, 256
_INPUT_SETS = 4  # taken in turn, so that no cache holds the data of the next call
_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}


class Setting(NamedTuple):
    """What all rows of a run have in common."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    channels: int
    backend: str
    repeats: int


class Row(NamedTuple):
    """One comparison before its times are known: calls by name, and the names of those that are baselines of each."""

    op: str
    ours: Callable[[int], object]
    baselines: dict[str, dict[str, Callable[[int], object]]]
    max_error: float


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    expected = expected.double()
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def require_small(op: str, error: float, limit: float) -> float:
    """The error. Raises ArithmeticError when it exceeds the limit."""
    if not error <= limit:
        raise ArithmeticError(f"{op}: the largest difference is {error:.1e}; times of wrong results mean nothing")
    return error


def drawn_points(setting: Setting, size: int, ratio: float) -> Points:
    if ratio == 1:
        return Points((size, size))
    generator = stream(0, Purpose.BENCHMARK, device=setting.device)
    return draw_points("uniform", generator, setting.batch, (size, size), int(size**2 * ratio), setting.device)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    return [out, *torch.autograd.grad(out, inputs, gradient)]


def conv_row(setting: Setting, size: int, ratio: float) -> Row:
    points, shape = drawn_points(setting, size, ratio), (setting.batch, int(size**2 * ratio), setting.channels)
    factory = {"device": setting.device, "dtype": setting.dtype}
    xs = [torch.randn(shape, **factory).requires_grad_() for _ in range(_INPUT_SETS)]
    dys = [torch.randn(shape, **factory) for _ in range(_INPUT_SETS)]
    weight = torch.randn(setting.channels, 1, K, K, device=setting.device).requires_grad_()
    backend = get_backend(setting.backend)
    plan = backend.plan(points, setting.batch, (K, K), K, setting.device)

    def ours(i: int) -> list[torch.Tensor]:
        j = i % _INPUT_SETS
        return gradients(backend.conv(xs[j], weight, plan, setting.channels), [xs[j], weight], dys[j])

    def dense(layout: torch.memory_format, cudnn: bool) -> Callable[[int], list[torch.Tensor]]:
        def call(i: int) -> list[torch.Tensor]:
            j = i % _INPUT_SETS
            with baselines.convolutions(cudnn):
                out = baselines.masked_convolution(xs[j], weight, plan, layout)
                return gradients(out, [xs[j], weight], dys[j])

        return call

    x, exact_weight = xs[0].detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = baselines.masked_convolution(x, exact_weight, plan, torch.contiguous_format)
    expected = gradients(exact, [x, exact_weight], dys[0].double())
    error = max(relative_error(*pair) for pair in zip(ours(0), expected))
    variants = {name: dense(*way) for name, way in baselines.dense_variants(setting.device).items()}
    return Row("conv", ours, {"dense masked": variants}, require_small("conv", error, _ERROR[setting.dtype]))


def block_row(setting: Setting, size: int, ratio: float) -> Row:
    points = drawn_points(setting, size, ratio)
    device, batch, channels = setting.device, setting.batch, setting.channels
    backend = get_backend(setting.backend)
    block = use_backend(SparseBlock(channels, K, time_dim=CONDITION, z_dim=CONDITION), backend).to(device)
    plan = backend.plan(points, batch, (K, K), K, device)
    factory = {"device": device, "dtype": setting.dtype}
    e, z = (torch.randn(batch, CONDITION, device=device) for _ in range(2))
    xs, dys = ([torch.randn(batch, points.count, channels, **factory) for _ in range(_INPUT_SETS)] for _ in range(2))
    xs = [x.requires_grad_() for x in xs]
    parameters = [p for name, p in block.named_parameters() if name not in ("norm1.bias", "norm2.bias")]

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=setting.dtype, enabled=setting.dtype != torch.float32)

    def ours(i: int) -> list[torch.Tensor]:
        j = i % _INPUT_SETS
        with autocast():
            out = block(xs[j], plan, affines=Conditioning(block.modulated, z)(e))
        return gradients(out, [xs[j], *parameters], dys[j].to(out.dtype))

    def masked(layout: torch.memory_format | None, cudnn: bool) -> Callable[[int], list[torch.Tensor]]:
        dense = baselines.MaskedBlock(block, plan)
        images = [[scatter_points(t.detach(), points) for t in tensors] for tensors in (xs, dys)]
        if layout is None:
            images = [[t.flatten(2).transpose(1, 2).contiguous() for t in tensors] for tensors in images]
        else:
            images = [[t.contiguous(memory_format=layout) for t in tensors] for tensors in images]
        inputs, grads = [x.requires_grad_() for x in images[0]], images[1]

        def call(i: int) -> list[torch.Tensor]:
            j = i % _INPUT_SETS
            with baselines.convolutions(cudnn), autocast():
                out = (dense.fused if layout is None else dense.as_published)(inputs[j], e, z)
            return gradients(out, [inputs[j], *parameters], grads[j].to(out.dtype))

        return call

    variants = baselines.dense_variants(device)
    reference = get_backend("torch_dense")
    plain = use_backend(copy.deepcopy(block), reference)
    plain_parameters = [p for name, p in plain.named_parameters() if name not in ("norm1.bias", "norm2.bias")]
    plain_plan = reference.plan(points, batch, (K, K), K, device)

    def torch_dense(i: int) -> list[torch.Tensor]:
        j = i % _INPUT_SETS
        with autocast():
            out = plain(xs[j], plain_plan, affines=Conditioning(plain.modulated, z)(e))
        return gradients(out, [xs[j], *plain_parameters], dys[j].to(out.dtype))

    contenders = {
        "dense masked": {name: masked(None, way[1]) for name, way in variants.items() if "channels_last" in name},
        "as published": {name: masked(*way) for name, way in variants.items()},
    }
    found, error = ours(0), 0.0
    for calls in contenders.values():
        out, dx, *of_parameters = next(iter(calls.values()))(0)
        expected = [baselines.at_points(out, points), baselines.at_points(dx, points), *of_parameters]
        error = max(error, *(relative_error(*pair) for pair in zip(found, expected)))
    contenders["torch_dense"] = {"at the points": torch_dense}
    return Row("block", ours, contenders, require_small("block", error, 10 * _ERROR[setting.dtype]))


def knn_row(setting: Setting, size: int, ratio: float) -> Row | None:
    if ratio == 1:
        return None  # static, and kept after the first time
    points, side, device = drawn_points(setting, size, ratio), size // 2, setting.device
    convention = CONVENTIONS["cell_centred"]

    def ours(_: int) -> torch.Tensor:
        found = nearest_points(points, (side, side), NEIGHBOURS, convention, device)
        first = found.squared[found.ends[:-1, None] + torch.arange(NEIGHBOURS, device=device)]
        return first.unflatten(0, (setting.batch, -1))  # (B, Q, K)

    def exhaustive(_: int) -> torch.Tensor:
        return baselines.nearest_by_brute_force(points, side, NEIGHBOURS, device)

    contenders = {"all distances": {"torch, chunked": exhaustive}}
    few = Points(points.size, points.index[:1])
    expected = baselines.nearest_by_brute_force(few, side, NEIGHBOURS, device)
    error = relative_error(ours(0)[:1], expected)
    if device.type == "cpu":
        contenders["k-d tree"] = {"scipy": lambda _: baselines.nearest_by_tree(points, side, NEIGHBOURS)}
        error = max(error, relative_error(ours(0), baselines.nearest_by_tree(points, side, NEIGHBOURS)))
    return Row("knn", ours, contenders, require_small("knn", error, _ERROR[torch.float32]))


def mollifier_row(setting: Setting, size: int, ratio: float) -> Row | None:
    if ratio != 1:
        return None  # smooths whole grids
    mollifier = Mollifier(1.0, (size, size))
    images = [torch.randn(setting.batch, 3, size, size, device=setting.device) for _ in range(_INPUT_SETS)]
    cosine = baselines.smoothing_by_cosine_transforms(mollifier, (size, size), setting.device)
    error = relative_error(mollifier(images[0]), cosine(images[0]))
    return Row(
        "mollifier",
        lambda i: mollifier(images[i % _INPUT_SETS]),
        {"cosine transforms": {"four products": lambda i: cosine(images[i % _INPUT_SETS])}},
        require_small("mollifier", error, _ERROR[torch.float32]),
    )


def coordinates_row(setting: Setting, size: int, ratio: float) -> Row | None:
    if ratio == 1:
        return None
    count, batch, device = int(size**2 * ratio), setting.batch, setting.device
    generator = stream(0, Purpose.BENCHMARK, device=device)

    def ours(_: int) -> torch.Tensor:
        return draw_points("uniform", generator, batch, (size, size), count, device).index

    def host(_: int) -> torch.Tensor:
        return baselines.coordinates_on_the_host(batch, size**2, count, device)

    return Row("coordinates", ours, {"host": {"NumPy, legacy": host}}, 0.0)


def engines_row(setting: Setting, size: int, ratio: float, backward: bool = True) -> Row:
    points, shape = drawn_points(setting, size, ratio), (setting.batch, int(size**2 * ratio), setting.channels)
    x = torch.randn(shape, device=setting.device, dtype=setting.dtype)
    chosen, calls, error = engine_calls(points, x, K, backward)
    op = "engines" if backward else "engines_forward"
    contenders = {name: {"forward and backward" if backward else "forward": call} for name, call in calls.items()}
    return Row(op, chosen, contenders, require_small(op, error, _ERROR[setting.dtype]))


OPERATORS = {
    "conv": conv_row,
    "block": block_row,
    "knn": knn_row,
    "mollifier": mollifier_row,
    "coordinates": coordinates_row,
    "engines": engines_row,
    "engines_forward": partial(engines_row, backward=False),
}
USUAL = [name for name in OPERATORS if not name.startswith("engines")]
