"""The mollifier against scipy's cosine transform and against convolutions in double precision."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import torch

import diffusion.cosine
import diffusion.mollifier
from diffusion.cosine import dct, idct, on_rows
from diffusion.mollifier import IDENTITY, Mollifier
from known_answers import coefficients, image

SIZES = [(16, 16), (12, 20), (7, 9), (1, 5)]


@pytest.fixture(params=["matrix", "fft"])
def path(request, monkeypatch):
    """Both ways to transform, at any size."""
    threshold = 1 if request.param == "fft" else 10**9
    monkeypatch.setattr(diffusion.cosine, "FFT_FROM", threshold)
    monkeypatch.setattr(diffusion.mollifier, "FFT_FROM", threshold)
    return request.param


def by_definition(x, sigmas, wiener=None):
    """T, or its Wiener inverse, through scipy's DCT."""
    spectrum = coefficients(x)
    k, l = (np.arange(n) / n for n in x.shape[-2:])  # noqa: E741 (the index of the formula)
    gain = np.exp(-(np.pi**2) * ((sigmas[0] * k[:, None]) ** 2 + (sigmas[1] * l[None, :]) ** 2) / 2)
    factor = gain if wiener is None else gain / (gain**2 + wiener**2)
    return image(factor * spectrum)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 15])
def test_cosine_transform_is_scipys(path, n):
    x = torch.randn(2, 3, n, dtype=torch.float64)
    torch.testing.assert_close(dct(x), torch.from_numpy(scipy.fft.dct(x.numpy(), norm="ortho")))
    torch.testing.assert_close(idct(dct(x)), x)
    y = torch.randn(2, n, 4, dtype=torch.float64)
    torch.testing.assert_close(on_rows(dct, y), torch.from_numpy(scipy.fft.dct(y.numpy(), axis=1, norm="ortho")))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_inverse(path, size, dtype):
    mollifier = Mollifier(1.2, (8, 10))
    sigmas = 1.2 * size[0] / 8, 1.2 * size[1] / 10
    x = torch.randn(2, 3, *size, dtype=dtype)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11}[dtype]
    for actual, expected in (
        (mollifier(x), by_definition(x, sigmas)),
        (mollifier.inverse(x, 0.05), by_definition(x, sigmas, wiener=0.05)),
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def test_gain_is_the_answer_to_each_cosine():
    mollifier = Mollifier(1.0, (8, 8))
    gain = mollifier.gain((6, 9))
    basis = image(np.eye(54).reshape(54, 6, 9))
    answers = (basis * mollifier(basis)).sum(dim=(1, 2)).reshape(6, 9)
    torch.testing.assert_close(answers, gain)
    assert gain[0, 0] == 1 and gain.dtype == torch.float64


def test_it_is_convolution_of_the_reflected_image_with_a_gaussian():
    """At 3 pixels a sampled Gaussian has no aliasing in double precision. scipy's 'reflect' repeats the border
    pixel."""
    x = torch.randn(1, 1, 24, 40, dtype=torch.float64)
    blurred = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), 3.0, mode="reflect", truncate=12)
    torch.testing.assert_close(Mollifier(3.0, (24, 40))(x)[0, 0], torch.from_numpy(blurred), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sigma", "side"), [(1.0, 5), (2.0, 9), (1.3, 7)])
def test_conv_kind_is_a_truncated_convolution(sigma, side):
    x = torch.randn(2, 4, 11, 18, dtype=torch.float64)
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    expected = x.numpy()
    for axis in (2, 3):
        expected = scipy.ndimage.correlate1d(expected, weights / weights.sum(), axis=axis, mode="mirror")
    torch.testing.assert_close(Mollifier(sigma, (11, 18), "conv")(x), torch.from_numpy(expected))


def test_identity_takes_any_shape():
    for shape in ((3, 24), (2, 3, 4, 5), (7,)):
        x = torch.randn(shape)
        assert IDENTITY.identity
        assert torch.equal(IDENTITY(x), x) and torch.equal(IDENTITY.inverse(x), x) and torch.equal(IDENTITY.noise(x), x)
    assert Mollifier(0.0, (8, 8)).noise_scale((16, 16)) == 1.0
    assert Mollifier(1.0, (8, 8)).noise_scale((16, 24)) == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(1, 2, 12, 20).to(dtype)
    mollifier = Mollifier(1.0, (12, 20))
    assert mollifier(x).dtype == dtype
    assert torch.equal(mollifier(x), mollifier(x.float()).to(dtype))
    assert torch.equal(mollifier.inverse(x), mollifier.inverse(x.float()).to(dtype))


def test_autocast_does_not_reach_it():
    x = torch.randn(1, 2, 12, 20)
    mollifier = Mollifier(1.0, (12, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mollifier(x), mollifier.inverse(x)
    assert torch.equal(inside[0], mollifier(x)) and torch.equal(inside[1], mollifier.inverse(x))


def test_gradient_is_the_operator_itself(path):
    """T and its Wiener inverse are symmetric: the gradient of <w, Tx> is Tw."""
    w = torch.randn(1, 2, 9, 12, dtype=torch.float64)
    for operator in (Mollifier(1.0, (8, 8)), Mollifier(1.0, (8, 8)).inverse):
        x = torch.randn_like(w, requires_grad=True)
        (w * operator(x)).sum().backward()
        torch.testing.assert_close(x.grad, operator(w))


def test_amplification_of_the_inverse_is_bounded():
    x = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    restored = coefficients(Mollifier(1.0, (32, 32)).inverse(x, 0.05))
    ratio = np.abs(restored / coefficients(x))
    assert 9.9 < ratio.max() <= 10 + 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mollifier(-1.0, (8, 8)), "sigma is -1"),
        (lambda: Mollifier(math.nan, (8, 8)), "sigma is nan"),
        (lambda: Mollifier(1.0, (8, 0)), r"\(8, 0\)"),
        (lambda: Mollifier(1.0, (8, 8), "gauss"), "dct, conv"),
        (lambda: Mollifier(1.0, (8, 8))(torch.zeros(8)), r"\(\.\.\., H, W\)"),
        (lambda: Mollifier(1.0, (8, 8))(torch.zeros(8, 8, dtype=torch.uint8)), "uint8"),
        (lambda: Mollifier(1.0, (8, 8)).inverse(torch.zeros(8, 8), 0.0), "inv_snr is 0"),
        (lambda: Mollifier(1.0, (8, 8), "conv").inverse(torch.zeros(8, 8)), "kind is 'conv'; accepted: 'dct'"),
        (lambda: Mollifier(1.0, (8, 8), "conv").gain((8, 8)), "only this has the gain"),
        (lambda: Mollifier(3.0, (4, 4), "conv")(torch.zeros(4, 4)), "image side is 4 pixels; accepted: above 6"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
