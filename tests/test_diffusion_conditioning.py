"""Inpainting in closed form: guidance on a Gaussian random field against its conditional mean; masks, fills, bands."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.fft
import torch

from diffusion.conditioning import Known, check_mask, descend, fill_hole, follow, join_bands
from diffusion.mollifier import Mollifier
from diffusion.noise import function_noise
from diffusion.process import DiffusionProcess, Prediction
from diffusion.samplers import ddim, ddim_invert, dpmpp
from known_answers import coefficients, process_of, seeded


class Field:
    """A Gaussian random field at one resolution with standard deviation 1/2, its optimal denoiser, draws and a hole."""

    def __init__(self, size: tuple[int, int], hole: tuple[slice, slice]):
        self.size, self.mollifier = size, Mollifier(1.0, size)
        k, l = (np.arange(n) for n in size)  # noqa: E741 (the index of the formula)
        c = 1 / (1 + 0.5 * (k[:, None] ** 2 + l**2))
        self.c = c * (0.25 * math.prod(size) / c.sum())
        self.gain = np.exp(-(np.pi**2) / 2 * ((k[:, None] / size[0]) ** 2 + (l / size[1]) ** 2))
        white = np.random.default_rng(0).standard_normal((24, 1, *size))
        self.sharp = self.filtered(np.sqrt(self.c), torch.from_numpy(white))
        self.mask = torch.ones(size, dtype=torch.bool)
        self.mask[hole] = False

    def filtered(self, factor: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """Cosine coefficients times factors, as a matrix so that gradients pass."""
        matrices = [scipy.fft.dct(np.eye(n), axis=0, norm="ortho") for n in self.size]
        rows, cols = (torch.from_numpy(matrix) for matrix in matrices)
        return rows.mT @ (torch.from_numpy(factor) * (rows @ x @ cols.mT)) @ cols

    def deblur(self, x: torch.Tensor) -> torch.Tensor:
        return self.mollifier.inverse(x, 0.05)

    def process(self, spec: str) -> DiffusionProcess:
        return process_of(size=self.size).respaced(spec)

    def known(self, process: DiffusionProcess) -> Known:
        return Known(torch.where(self.mask, self.sharp, math.nan), self.mask, process, self.deblur)

    def denoiser(self, process: DiffusionProcess):
        alpha_bars = process.schedule.alpha_bar.tolist()
        times = process.schedule.network_time(torch.arange(len(alpha_bars))).tolist()

        def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            a = alpha_bars[times.index(float(time[0]))]
            return self.filtered(math.sqrt(1 - a) / (a * self.c + 1 - a), x)

        return process.denoiser(network, clip=False)

    def conditional_mean(self) -> torch.Tensor:
        """E[T x_0 | the known pixels of x_0], by the covariance matrix of all pixels."""
        count = math.prod(self.size)
        unit = torch.eye(count, dtype=torch.float64).reshape(count, *self.size)
        covariance = self.filtered(self.c, unit).reshape(count, count)
        seen = self.mask.flatten()
        weights = torch.linalg.solve(covariance[seen][:, seen], self.sharp.flatten(1)[:, seen].mT)
        return self.filtered(self.gain, (covariance[:, seen] @ weights).mT.reshape(self.sharp.shape))

    def guided_error(self, scale: float, spec: str, sampler=ddim, plain: bool = False) -> tuple[float, float]:
        """How far the sampler's mean is from the conditional one in the hole, over how far the prior's (0) is; and the
        same of known pixels. The sampler is affine in x_T, so that its mean is what it makes of x_T = 0."""
        process = self.process(spec)
        zero = torch.zeros_like(self.sharp)
        guided = self.known(process).guided(self.denoiser(process), plain=plain)
        x = sampler(guided, zero, process, correct=descend(scale))
        expected = self.conditional_mean()
        errors = [(x - expected)[..., part].norm() / expected[..., part].norm() for part in (~self.mask, self.mask)]
        return tuple(float(error) for error in errors)


UNMOLLIFIED = process_of(Prediction.EPS, sigma=0.0, steps=10)
FIELDS = {
    "wide": Field((16, 24), (slice(5, 11), slice(8, 15))),
    "tall": Field((21, 13), (slice(8, 14), slice(4, 9))),
    "small hole": Field((32, 28), (slice(12, 16), slice(8, 12))),
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_guidance_moves_to_the_conditional_mean(field, plain):
    by_scale = [field.guided_error(scale, "100", plain=plain) for scale in (0.0, 0.01, 0.02, 0.05)]
    by_steps = [field.guided_error(0.05, spec, plain=plain) for spec in ("10", "25", "50", "100")]
    assert by_scale[0][0] == pytest.approx(1)  # without guidance the mean is that of the prior
    for errors in (by_scale, by_steps):
        for coarse, fine in pairwise(errors):
            assert fine[0] < 0.95 * coarse[0] and fine[1] < coarse[1]
    assert by_steps[-1][0] < 0.5


@pytest.mark.parametrize(("sampler", "spec"), [(ddim, "25"), (ddim, "100"), (dpmpp, "logsnr20"), (dpmpp, "logsnr50")])
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_the_usual_strength_suits_every_sampler_and_number_of_steps(field, sampler, spec):
    in_hole, elsewhere = field.guided_error(0.4, spec, sampler)
    assert in_hole < 0.4 and elsewhere < 0.15


def test_gradient_is_that_of_the_formula():
    """Against central differences of ‖m ⊙ (μ̃_0(x_t) - T x̄)‖² with T x̄ held constant."""
    field = FIELDS["wide"]
    process = field.process("10")
    denoise, t = field.denoiser(process), torch.tensor([6])
    x = torch.randn(field.sharp.shape, dtype=torch.float64, generator=seeded())
    with torch.no_grad():
        known = field.known(process)
        guided, natural = known.guided(denoise, plain=True)(x, t), known.guided(denoise)(x, t)
        target = field.mollifier(known.completed(field.deblur(denoise(x, t).smooth)))
        for row, col in [(0, 0), (7, 10), (5, 7), (15, 23)]:
            nudge = torch.zeros_like(x)
            nudge[0, 0, row, col] = 1e-4
            losses = [(field.mask * (denoise(x + s * nudge, t).smooth - target)).square().sum() for s in (1, -1)]
            assert guided.gradient[0, 0, row, col] == pytest.approx(float(losses[0] - losses[1]) / 2e-4, rel=1e-6)
        covariance = process.schedule.alpha_bar[6].sqrt() * field.filtered(field.gain**2, guided.gradient)
        torch.testing.assert_close(natural.gradient, covariance)
        torch.testing.assert_close(guided.smooth, denoise(x, t).smooth)
        torch.testing.assert_close(guided.noise, denoise(x, t).noise)
    assert not guided.smooth.requires_grad


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_following_the_inversion_keeps_known_pixels_exactly(field):
    process = field.process("50")
    denoise, clean = field.denoiser(process), field.mollifier(field.sharp)
    states = [clean]
    code = ddim_invert(denoise, clean, process, callback=lambda i, t, x, d: states.append(x))
    assert len(states) == process.schedule.num_steps and torch.equal(states[-1], code)
    weights = field.known(process).soft_mask()
    fresh = process.mollifier.noise(torch.randn(field.sharp.shape, dtype=torch.float64, generator=seeded(2)))
    x = ddim(denoise, fresh, process, correct=follow(states, weights))
    sure = weights > 0.999
    assert sure.any() and (x - clean)[..., sure].abs().max() < 5e-3
    hole = ~field.mask
    assert (x[0] - x[1])[..., hole].std() > 0.1  # and leaves the hole to the noise
    assert weights[hole].max() < 0.05


def test_soft_mask_of_white_noise_diffusion_is_the_mask():
    mask = torch.rand(7, 9, generator=seeded()) > 0.5
    known = Known(torch.zeros(1, 3, 7, 9), mask, UNMOLLIFIED, lambda x: x)
    assert torch.equal(known.soft_mask(), mask.float())


@pytest.mark.parametrize("size", [(20, 33), (64, 40)])
def test_fill_reads_nothing_inside_the_hole_and_continues_what_is_outside(size):
    mask = torch.ones(size, dtype=torch.bool)
    mask[3 : size[0] - 6, 8:20] = False
    rows = torch.linspace(-1, 1, size[0])[:, None].expand(size).expand(1, 3, *size)
    image = torch.where(mask, rows, math.nan)
    filled = fill_hole(image, mask)
    assert torch.equal(filled[..., mask], rows[..., mask])
    assert (filled - rows).abs().max() < 0.8 and (filled - rows)[..., ~mask].abs().mean() < 0.3
    constant = fill_hole(torch.where(mask, 0.3, math.nan).expand(1, 1, *size), mask)
    torch.testing.assert_close(constant, torch.full_like(constant, 0.3))


@pytest.mark.parametrize("corner", [(0, 0), (30, 2)])
def test_fill_from_a_single_pixel(corner):
    mask = torch.zeros(31, 17, dtype=torch.bool)
    mask[corner] = True
    image = torch.full((1, 1, 31, 17), math.nan)
    image[0, 0][corner] = -0.4
    torch.testing.assert_close(fill_hole(image, mask), torch.full((1, 1, 31, 17), -0.4))


@pytest.mark.parametrize(("coarse", "fine"), [((8, 8), (16, 16)), ((6, 10), (15, 20)), ((9, 7), (9, 14))])
def test_bands_of_one_function_join_to_it(coarse, fine):
    """White noise drawn as one function at two resolutions: its shared band is the coarse one, scaled by pixels."""
    a, b = function_noise([(s, 0, 0) for s in (0, 1)], 2, fine).split(1)
    joined = coefficients(join_bands(a, b, coarse))
    expected = coefficients(b)
    shared = coefficients(a)
    expected[..., : coarse[0], : coarse[1]] = shared[..., : coarse[0], : coarse[1]]
    np.testing.assert_allclose(joined, expected, atol=1e-5)


def test_wrong_masks_are_named():
    some = torch.zeros(4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask is torch.bool \(4, 6\); accepted: torch.bool \(6, 4\)"):
        check_mask(some, (6, 4))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        Known(torch.zeros(1, 1, 4, 6), some.float(), UNMOLLIFIED, lambda x: x)
    with pytest.raises(ValueError, match="mask has only unknown pixels"):
        fill_hole(torch.zeros(1, 1, 4, 6), some)
    with pytest.raises(ValueError, match="mask has no unknown pixels"):
        check_mask(~some, (4, 6))
