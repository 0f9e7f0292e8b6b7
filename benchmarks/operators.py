"""Time the operators of the sparse path against the best dense and exhaustive forms of the same.

    python benchmarks/operators.py --device=cpu --sizes=64,128 --ratios=1,0.5,0.25,0.125 --json=PATH

A row compares one operator with one baseline on random data, results having been checked first:

    conv         depthwise convolution at the points, forward and backward, against `conv2d` on masked grids in
                 every layout (and with and without cuDNN): the fastest counts; points in the list's making apart
    block        residual block, forward and backward, against the block on masked grids: with the fused norms and
                 channels-last products of this repository, and as the published code computes it; and against
                 the same block on the back end torch_dense, "slower" where that wins by more than a tenth
    knn          the nearest points of a grid of half the side, against all distances and, on a CPU, a k-d tree
    mollifier    smoothing of images, against cosine transform, product and inverse transform
    coordinates  drawing the points, against NumPy's legacy generator on the host, image by image
    engines      only if asked for: the convolution of the native back end by the engine that it chooses, against each
                 that it could; engines_forward the same without gradients

Both sides take turns in one process; times are medians. max_error is the largest difference from float64 (conv), from
the baseline (others), over the largest value, of results and gradients. "scaling" tells how the time of an operator of
ours grows with four times the points at the same ratio; there the sizes take turns.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.interleaved import Timing, interleaved
from benchmarks.operator_rows import NEIGHBOURS, OPERATORS, USUAL, K, Row, Setting
from benchmarks.report import machine, operator_table
from diffusion.random import Purpose, seed_global
from models.operators.dispatch import BACKEND_NAMES, get_backend
from runtime.files import write_json


def measure(setting: Setting, op: str, size: int, ratio: float) -> Iterator[dict[str, Any]]:
    """One result for every baseline of an operator, the fastest variant of the baseline standing for it."""
    row = OPERATORS[op](setting, size, ratio)
    if row is None:
        return
    calls = {"ours": row.ours}
    calls |= {f"{kind}: {name}": call for kind, ways in row.baselines.items() for name, call in ways.items()}
    times = interleaved(calls, setting.device, setting.repeats)
    for kind, ways in row.baselines.items():
        best = min((f"{kind}: {name}" for name in ways), key=lambda name: times[name].ms)
        yield _result(row, setting, size, ratio, best, times)


def _result(row: Row, setting: Setting, size: int, ratio: float, best: str, times: dict[str, Timing]) -> dict[str, Any]:
    ours, theirs = times["ours"], times[best]
    return {
        "op": row.op,
        "size": size,
        "ratio": ratio,
        "backend": get_backend(setting.backend).name if row.op in ("conv", "block") else "-",
        "ms": ours.ms,
        "quartiles": [ours.low, ours.high],
        "baseline": best,
        "baseline_ms": theirs.ms,
        "baseline_quartiles": [theirs.low, theirs.high],
        "speedup": theirs.ms / ours.ms,
        "max_error": row.max_error,
        "repeats": [ours.repeats, theirs.repeats],
    }


def scaling(setting: Setting, op: str, sizes: list[int], ratio: float) -> Iterator[dict[str, Any]]:
    """Growth of the time of ours from one size to the double: four times the points."""
    pairs = [(size, 2 * size) for size in sizes if 2 * size in sizes]
    rows = {size: OPERATORS[op](setting, size, ratio) for size in sorted({size for pair in pairs for size in pair})}
    calls = {str(size): row.ours for size, row in rows.items() if row is not None}
    times = interleaved(calls, setting.device, setting.repeats)
    for pair in pairs:
        if calls:
            few, many = (times[str(size)].ms for size in pair)
            yield {"op": op, "ratio": ratio, "sizes": list(pair), "ms": [few, many], "growth": many / few}


def main() -> None:
    arguments = _parse()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    batch = arguments.batch or (32 if device.type == "cuda" else 4)
    setting = Setting(device, dtype, batch, arguments.channels, arguments.backend, arguments.repeats)
    seed_global(0, Purpose.BENCHMARK, device=device)
    cases = itertools.product(arguments.ops, arguments.sizes, arguments.ratios)
    rows = [row for op, size, ratio in cases for row in measure(setting, op, size, ratio)]
    cases = itertools.product(arguments.ops, arguments.ratios)
    growths = [growth for op, ratio in cases for growth in scaling(setting, op, arguments.sizes, ratio)]
    result = {
        "benchmark": "operators",
        **machine(device),
        **{"dtype": arguments.dtype, "batch": batch, "channels": setting.channels, "kernel": K},
        "rows": rows,
        "scaling": growths,
    }
    print(operator_table(result))
    if arguments.json:
        write_json(arguments.json, result)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", type=_names, default=USUAL, help=f"any of {','.join(OPERATORS)}")
    parser.add_argument("--sizes", type=_sizes, default=[64, 128], help="sides of the grid, e.g. 64,128")
    parser.add_argument("--ratios", type=_ratios, default=[1, 0.5, 0.25, 0.125], help="fractions of the grid seen")
    parser.add_argument("--batch", type=_positive, help="images; default: 32 on a GPU, 4 on a CPU")
    parser.add_argument("--channels", type=_positive, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="of the features")
    parser.add_argument("--backend", choices=BACKEND_NAMES, default="auto", help="of conv and block")
    parser.add_argument("--repeats", type=_positive, default=20)
    parser.add_argument("--json", type=Path, help="file for the result; default: none")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: no CUDA device is visible to PyTorch; accepted: cpu")
    if arguments.json and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        parser.error(f"--json is {arguments.json}; accepted: a file in a folder that exists")
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}; accepted: integers from 1")
    return value


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if min(sizes) < 2 * NEIGHBOURS:
        raise argparse.ArgumentTypeError(f"{text}; accepted: sides from {2 * NEIGHBOURS}")
    return sizes


def _ratios(text: str) -> list[float]:
    ratios = [float(part) for part in text.split(",")]
    if not all(0 < ratio <= 1 and not math.isnan(ratio) for ratio in ratios):
        raise argparse.ArgumentTypeError(f"{text}; accepted: numbers above 0 and up to 1")
    return ratios


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(OPERATORS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; accepted: {', '.join(OPERATORS)}")
    return names


if __name__ == "__main__":
    main()
