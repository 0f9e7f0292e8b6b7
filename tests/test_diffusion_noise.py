"""Noise: white at every resolution, one function at all of them."""

import time

import pytest
import torch

from diffusion.mollifier import Mollifier
from diffusion.noise import function_noise
from diffusion.random import Purpose, key
from known_answers import coefficients


def draw(seed: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    return function_noise([key(seed, Purpose.IMAGE)], channels, size)[0]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (37, 21), (5, 700)])
def test_is_white(size):
    noise = function_noise([key(seed, Purpose.IMAGE) for seed in range(40)], 3, size)
    assert noise.shape == (40, 3, *size) and noise.is_contiguous()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    neighbours = (noise[..., 1:] * noise[..., :-1]).mean(), (noise[..., 1:, :] * noise[..., :-1, :]).mean()
    assert max(abs(c) for c in neighbours) < 5 / count**0.5


SIZES = [((32, 32), (64, 64)), ((32, 32), (48, 80)), ((30, 50), (64, 64)), ((64, 300), (300, 64)), ((5, 7), (1, 9))]


@pytest.mark.parametrize("sizes", SIZES)
def test_resolutions_share_their_common_coefficients(sizes):
    (h, w), fine = sizes
    coarse = coefficients(draw(3, 2, (h, w)))
    finer = coefficients(draw(3, 2, fine))
    rows, cols = min(h, fine[0]), min(w, fine[1])
    assert abs(coarse[:, :rows, :cols] - finer[:, :rows, :cols]).max() < 2e-5


def test_mollified_noise_is_one_function():
    """T ξ at 32 is T ξ at 96 read at the centres of the coarse cells (every third pixel), but for what T leaves
    above the coarse Nyquist frequency."""
    mollifier = Mollifier(2.0, (32, 32))
    coarse = mollifier.noise(draw(5, 1, (32, 32)))
    fine = mollifier.noise(draw(5, 1, (96, 96)))[:, 1::3, 1::3]
    assert (coarse - fine).abs().max() < 0.02 * coarse.std()


def test_a_panorama_costs_its_pixels():
    """In turns with a square of as many pixels; one that drew max(H, W)² numbers would take 64 times as long."""

    def seconds(size):
        start = time.process_time()
        draw(0, 3, size)
        return time.process_time() - start

    pairs = [(seconds((16, 65536)), seconds((1024, 1024))) for _ in range(3)]
    assert min(a for a, _ in pairs) < 6 * min(b for _, b in pairs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_draw_one_noise():
    keys = [key(seed, Purpose.IMAGE) for seed in range(3)]
    there = function_noise(keys, 3, (33, 70), "cuda")
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), function_noise(keys, 3, (33, 70)), rtol=0, atol=1e-4)
