"""Stand-ins for libraries of sparse convolutions: slow, on CPUs, by each library's conventions.

Each function returns modules by name, for `sys.modules`. Names, order of arguments, layout of coordinates and kernels
are those of torchsparse 2.0, its fork with depthwise convolutions and 2.1, and spconv 2.3.
"""

from __future__ import annotations

import enum
import itertools
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch


def modules(contents: dict[str, dict]) -> dict[str, ModuleType]:
    """Modules with the given contents, and the packages they are in."""
    found: dict[str, ModuleType] = {}
    for path, names in contents.items():
        parts = path.split(".")
        for i, part in enumerate(parts):
            name = ".".join(parts[: i + 1])
            if name not in found:
                found[name] = ModuleType(name)
                found[name].__spec__, found[name].__path__ = ModuleSpec(name, None), []
                if i:
                    setattr(found[".".join(parts[:i])], part, found[name])
        vars(found[path]).update(names)
    return found


def offsets(kernel_size, first_fastest=False):
    """Offsets of the taps of a kernel with odd sides, the last axis running fastest, or the first."""
    ranges = [range(-(k // 2), k // 2 + 1) for k in kernel_size]
    if first_fastest:
        return [offset[::-1] for offset in itertools.product(*reversed(ranges))]
    return list(itertools.product(*ranges))


def find_pairs(images, positions, taps, limits=None):
    """Rows of neighbours and of the points they are neighbours of, by tap; `limits` end the lattice, below 0 too."""
    row = {(b, *p): i for i, (b, p) in enumerate(zip(images.tolist(), positions.tolist()))}
    assert len(row) == len(images), "a coordinate is repeated"
    pairs = []
    for tap in taps:
        found = []
        for (b, *p), i in row.items():
            there = [x + d for x, d in zip(p, tap)]
            inside = limits is None or all(0 <= x < n for x, n in zip(there, limits))
            if inside and (b, *there) in row:
                found.append((row[(b, *there)], i))
        pairs.append(torch.tensor(found, dtype=torch.long).reshape(-1, 2))
    return pairs


def convolve(x, taps, pairs):
    """Σ over taps (K, C, C_out), or (K, 1, C) depthwise, pair by pair."""
    assert len(taps) == len(pairs)
    out = x.new_zeros(len(x), taps.shape[2])
    for tap, pair in zip(taps, pairs):
        there = x[pair[:, 0]]
        out = out.index_add(0, pair[:, 1], there @ tap if len(tap) == x.shape[1] else there * tap[0])
    return out


def torchsparse_2_0(*, fork):
    """Coordinates (x, y, z, image); taps with the first axis fastest; the fork's conv3d takes `depthwise`."""

    class SparseTensor:
        def __init__(self, feats, coords, stride=1):
            assert coords.dtype == torch.int32
            self.feats, self.coords, self.stride, self.kmaps = feats, coords, stride, {}

    def run(tensor, weight, kernel_size, depthwise):
        assert depthwise or weight.shape[1] == tensor.feats.shape[1], "Input feature size and kernel size mismatch"
        if kernel_size not in tensor.kmaps:
            taps = offsets(kernel_size, first_fastest=True)
            tensor.kmaps[kernel_size] = find_pairs(tensor.coords[:, 3], tensor.coords[:, :3], taps)
        return SparseTensor(convolve(tensor.feats, weight, tensor.kmaps[kernel_size]), tensor.coords)

    def conv3d(input, weight, kernel_size, bias=None, stride=1, dilation=1, transposed=False):
        return run(input, weight, kernel_size, False)

    def conv3d_fork(input, weight, kernel_size, bias=None, stride=1, dilation=1, depthwise=False, transposed=False):
        return run(input, weight, kernel_size, depthwise)

    functional = SimpleNamespace(conv3d=conv3d_fork if fork else conv3d)
    return modules(
        {
            "torchsparse": {"__version__": "2.0.0b", "SparseTensor": SparseTensor},
            "torchsparse.nn": {"functional": functional},
        }
    )


def torchsparse_2_1(*, image_column=0, first_fastest=True):
    """Coordinates (image, x, y, z), inside `spatial_range` as the padding leaves it; backward only if training.

    With other arguments than the defaults: a library whose order of coordinates or taps is another.
    """

    class SparseTensor:
        def __init__(self, feats, coords, stride=1, spatial_range=None):
            assert coords.dtype == torch.int32
            self.feats, self.coords, self.spatial_range, self._caches = feats, coords, spatial_range, {}

    def conv3d(
        input, weight, kernel_size, bias=None, stride=1, padding=0, dilation=1, config=None, transposed=False,
        generative=False, training=False,
    ):  # fmt: skip
        assert weight.shape[1] == input.feats.shape[1]
        if kernel_size not in input._caches:
            limits = [n + 2 * p - k + 1 for n, p, k in zip(input.spatial_range[1:], padding, kernel_size)]
            taps = offsets(kernel_size, first_fastest)
            position = [column for column in range(4) if column != image_column]
            pairs = find_pairs(input.coords[:, image_column], input.coords[:, position], taps, limits)
            input._caches[kernel_size] = pairs, training
        pairs, backward = input._caches[kernel_size]
        feats = input.feats if backward else input.feats.detach()
        return SparseTensor(convolve(feats, weight, pairs), input.coords)

    return modules(
        {
            "torchsparse": {"__version__": "2.1.0", "SparseTensor": SparseTensor},
            "torchsparse.nn": {"functional": SimpleNamespace(conv3d=conv3d)},
        }
    )


def spconv_2_3(*, cpu_only):
    """Indices (image, row, column); kernels (C_out, k_h, k_w, C)."""
    algorithms = enum.Enum("ConvAlgo", {"Native": 0, "MaskImplicitGemm": 1, "MaskSplitImplicitGemm": 2})

    def get_indice_pairs(
        indices, batch_size, spatial_shape, algo, ksize, stride, padding, dilation, out_padding, subm=False,
        transpose=False, num_out_act_bound=-1,
    ):  # fmt: skip
        assert subm and algo is algorithms.Native and indices.dtype == torch.int32 and indices.is_contiguous()
        assert indices[:, 0].max() < batch_size
        assert (indices[:, 1:] < torch.tensor(spatial_shape)).all()
        pairs = find_pairs(indices[:, 0], indices[:, 1:], offsets(ksize), spatial_shape)
        table = torch.full((2, len(pairs), len(indices)), -1, dtype=torch.int32)
        for tap, pair in enumerate(pairs):
            table[:, tap, : len(pair)] = pair.t()
        return indices, table, torch.tensor([len(pair) for pair in pairs], dtype=torch.int32)

    def indice_subm_conv(features, filters, indice_pairs, indice_pair_num, num_activate_out, algo):
        assert filters.is_contiguous() and num_activate_out == len(features)
        pairs = [indice_pairs[:, tap, :n].t().long() for tap, n in enumerate(indice_pair_num.tolist())]
        return convolve(features, filters.flatten(1, 2).permute(1, 2, 0), pairs)

    return modules(
        {
            "spconv.cppconstants": {"CPU_ONLY_BUILD": cpu_only},
            "spconv.core": {"ConvAlgo": algorithms},
            "spconv.pytorch": {
                "ops": SimpleNamespace(get_indice_pairs=get_indice_pairs),
                "functional": SimpleNamespace(indice_subm_conv=indice_subm_conv),
            },
        }
    )
