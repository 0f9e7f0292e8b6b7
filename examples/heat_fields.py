"""Write fields to train on: heat that flows from random temperatures, in a square whose walls are insulated.

    python examples/heat_fields.py heat.npz 2000 0.5

The solution of ∂u/∂t = Δu is exact: a cosine wave (k, l) decays as exp(-π² (k² + l²) t). Arguments are the file, how
many fields, and which part of their points is not known (nan), by default none.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from diffusion.random import Purpose, numpy_stream

SIZE, TIME = 32, 0.002


def main(file: str, count: str = "2000", unknown: str = "0") -> None:
    rng, k = numpy_stream(0, Purpose.BENCHMARK), np.arange(SIZE)
    waves = np.cos(np.pi * np.outer((k + 0.5) / SIZE, k))  # (points, waves) along an axis
    squares = k[:, None] ** 2 + k**2
    before = rng.normal(size=(int(count), SIZE, SIZE)) / (1 + squares / 8)
    after = before * np.exp(-(np.pi**2) * squares * TIME)
    fields = np.stack([waves @ u @ waves.T for u in (before, after)], axis=1)
    fields[np.broadcast_to(rng.random((int(count), 1, SIZE, SIZE)) < float(unknown), fields.shape)] = np.nan
    np.savez_compressed(file, before=fields[:, 0].astype(np.float32), after=fields[:, 1].astype(np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
