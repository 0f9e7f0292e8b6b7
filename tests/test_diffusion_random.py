"""Random streams: no two alike, every bit of a key counts, and nothing else in the project seeds a generator."""

import ast
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from diffusion import random
from diffusion.random import Purpose, key, normals, numpy_stream, seed_global, stream

ROOT = Path(__file__).parents[1]
SEEDS = (0, 7, 1 << 32, 7 + (1 << 32), 7 + (1 << 70))
INDICES = ((), (0,), (7,), (0, 7), (7, 0), (0, 7, 0), (1 << 32,), (7, 1 << 40))
# Comparisons with other code, which must draw as that does: of clean-fid, and of the published training.
FOREIGN = {
    ("metrics/frechet.py", "RandomState"), ("benchmarks/baselines.py", "choice"), ("benchmarks/published.py", "choice"),
}  # fmt: skip


def all_keys():
    return itertools.product(SEEDS, Purpose, INDICES)


@pytest.mark.parametrize("draw", [
    lambda *where: torch.randint(1 << 62, (), generator=stream(*where[:2], *where[2])).item(),
    lambda *where: int(numpy_stream(*where[:2], *where[2]).integers(1 << 62)),
    lambda *where: key(*where[:2], *where[2]),
], ids=["torch", "numpy", "key"])  # fmt: skip
def test_no_two_streams_are_alike(draw):
    keys = list(all_keys())
    assert len({draw(*where) for where in keys}) == len(keys) >= 500


def test_streams_do_not_change():
    """Another value here means that every trained weight and every image of a seed changes."""
    assert stream(3, Purpose.STEP, 5, 0).get_state()[24:32].tolist() == [118, 16, 102, 18, 0, 0, 0, 0]
    assert numpy_stream(3, Purpose.ORDER, 5).bit_generator.random_raw() == 16471846348730333802
    assert key(3, Purpose.IMAGE) == (2759564626, 3500721523, 1198864670)


def test_seeds_that_differ_in_high_bits_give_other_numbers_on_a_cpu():
    """PyTorch by itself takes the lower 32 bits, NumPy as many words as there are."""
    low, high = (torch.Generator().manual_seed(s) for s in (7, 7 + (1 << 32)))
    assert torch.equal(torch.randn(4, generator=low), torch.randn(4, generator=high))
    low, high = (stream(s, Purpose.STEP, 0, 0) for s in (7, 7 + (1 << 32)))
    assert not torch.equal(torch.randn(4, generator=low), torch.randn(4, generator=high))


def test_state_is_that_of_a_mersenne_twister():
    """Against NumPy's, given the same words: PyTorch keeps them where `stream` puts them."""
    generator = stream(11, Purpose.STEP, 2, 0)
    words = np.frombuffer(generator.get_state().numpy().tobytes(), "<u8")[3:627].astype(np.uint32)
    numpys = np.random.MT19937()
    numpys.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    high, low = numpys.random_raw(2000).astype(np.uint64).reshape(1000, 2).T
    found = torch.randint(1 << 62, (1000,), generator=generator)  # two words a number, the upper one first
    assert np.array_equal(found.numpy(), (high << np.uint64(32) | low) % np.uint64(1 << 62))
    assert len(np.unique(words)) > 600


def test_initial_weights_follow_from_the_seed_alone():
    torch.rand(5)
    seed_global(4, Purpose.WEIGHTS)
    first = torch.nn.Linear(3, 3).weight
    seed_global(4, Purpose.WEIGHTS)
    assert torch.equal(first, torch.nn.Linear(3, 3).weight)
    seed_global(4, Purpose.DROPOUT, 0, 0)
    assert not torch.equal(first, torch.nn.Linear(3, 3).weight)


@pytest.mark.parametrize(("counter", "words", "expected"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])  # fmt: skip
def test_philox_known_answers(counter, words, expected):
    """The test vectors that Salmon et al. publish with Random123 for philox4x32, 10 rounds."""
    rounds = [tuple(map(torch.tensor, pair)) for pair in random._round_keys((*words, 0))]
    assert tuple(int(word) for word in random._philox(tuple(map(torch.tensor, counter)), rounds)) == expected


def philox(counter, k0, k1):
    """Integers of any size instead of words that overflow."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        (h0, l0), (h1, l1) = divmod(0xD2511F53 * c0, 1 << 32), divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


def test_numbers_are_the_formula():
    keys, (height, width) = [key(1, Purpose.IMAGE), key(2, Purpose.IMAGE_STEP, 4)], (5, 7)
    found = normals(keys, 2, (height, width)).double().numpy()
    assert found.shape == (2, 2, 5, 7)
    for b, c, k, j in np.ndindex(2, 2, height, width):
        words = philox((j // 4, k, c, keys[b][2]), *keys[b][:2])
        u, v = words[2 * (j % 4 // 2) : 2 * (j % 4 // 2) + 2]
        radius, angle = (-2 * np.log((u + 0.5) / 2**32)) ** 0.5, 2 * np.pi * v / 2**32
        assert found[b, c, k, j] == pytest.approx(radius * (np.cos(angle), np.sin(angle))[j % 2], abs=3e-6)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (40, 3), (3, 1030)])
def test_numbers_do_not_depend_on_what_is_drawn_with_them(size, monkeypatch):
    keys = [key(seed, Purpose.IMAGE) for seed in range(5)]
    whole = normals(keys, 3, (41, 1031))
    part = normals(keys[2:3], 2, size)
    assert torch.equal(part, whole[2:3, :2, : size[0], : size[1]])
    monkeypatch.setitem(random._BLOCKS, "cpu", 7)  # row by row
    assert torch.equal(normals(keys[2:3], 2, size), part)


def test_numbers_are_normal_and_independent():
    x = normals([key(s, Purpose.IMAGE) for s in range(20)], 3, (65, 130)).double()
    assert scipy.stats.kstest(x.flatten()[:200_000].numpy(), "norm").pvalue > 1e-3
    count = x.numel()
    for lag in ((0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 4)):
        shifted = torch.roll(x, lag, (0, 1, 2, 3))
        assert abs((x * shifted).mean()) < 5 / count**0.5
        assert abs(((x**2 - 1) * (shifted**2 - 1)).mean()) < 5 * 2 / count**0.5


def sources() -> list[Path]:
    files = [*ROOT.glob("*.py"), *(f for f in ROOT.glob("*/**/*.py") if f.parent.parts[len(ROOT.parts)][0] != ".")]
    return [file for file in files if file.relative_to(ROOT).parts[0] not in ("tests", "build")]


def test_nothing_else_makes_or_seeds_a_generator():
    """Calls by name, wherever the name comes from, and draws from NumPy's global generator."""
    makers = {"manual_seed", "manual_seed_all", "seed", "seed_all", "default_rng", "SeedSequence", "Generator", "PCG64",
              "MT19937", "Philox", "SFC64", "RandomState", "set_rng_state", "Random", "SystemRandom"}  # fmt: skip
    found = set()
    for file in sources():
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called.split(".")[-1] in makers or re.match(r"(np|numpy)\.random\.|random\.\w+$", called):
                    found.add((name, called.split(".")[-1]))
    own = {what for name, what in found if name == "diffusion/random.py"}
    assert {"Generator", "manual_seed", "PCG64"} <= own
    assert {(name, what) for name, what in found if name != "diffusion/random.py"} == FOREIGN


def test_every_purpose_has_one_place():
    """Benchmarks share theirs, and initial weights are drawn by the command of each stage."""
    places: dict[str, set[str]] = {purpose.name: set() for purpose in Purpose}
    for file in sources():
        for name in re.findall(r"\bPurpose\.([A-Z_]+)\b", file.read_text()):
            places[name].add(file.relative_to(ROOT).as_posix())
    shared = {name: files for name, files in places.items() if len(files) != 1}
    assert set(shared) == {"WEIGHTS", "BENCHMARK"}, shared
