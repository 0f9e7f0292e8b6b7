"""Noise: white on every lattice, one function on all of them."""

import pytest
import torch
from scipy.fft import dctn

from diffusion.mollifier import Mollifier
from diffusion.noise import derive_seed, function_noise


def draw(seed: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    return function_noise(torch.Generator().manual_seed(seed), channels, size)


def test_seeds_differ_and_do_not_change():
    seeds = {derive_seed(a, name, b) for a in range(30) for name in ("step", "latent") for b in range(30)}
    assert len(seeds) == 1800
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "step", 1) == 1578201625287471526


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (37, 21)])
def test_is_white(size):
    noise = torch.stack([draw(seed, 3, size) for seed in range(40)])
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean(), (noise[..., 1:, :] * noise[..., :-1, :]).mean()
    assert max(abs(c) for c in neighbours) < 5 / count**0.5


@pytest.mark.parametrize("sizes", [((32, 32), (64, 64)), ((32, 32), (48, 80)), ((30, 50), (64, 64))])
def test_lattices_share_their_common_coefficients(sizes):
    (h, w), fine = sizes
    coarse = dctn(draw(3, 2, (h, w)).double().numpy(), axes=(1, 2), norm="ortho")
    finer = dctn(draw(3, 2, fine).double().numpy(), axes=(1, 2), norm="ortho")
    rows, cols = min(h, fine[0]), min(w, fine[1])
    assert abs(coarse[:, :rows, :cols] - finer[:, :rows, :cols]).max() < 1e-5


def test_mollified_noise_is_one_function():
    """T ξ at 32 is T ξ at 96 read at the centres of the coarse cells (every third pixel), but for what T leaves
    above the coarse Nyquist frequency."""
    mollifier = Mollifier(2.0, (32, 32))
    coarse = mollifier.noise(draw(5, 1, (32, 32)))
    fine = mollifier.noise(draw(5, 1, (96, 96)))[:, 1::3, 1::3]
    assert (coarse - fine).abs().max() < 0.02 * coarse.std()
