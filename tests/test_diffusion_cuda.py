"""What only a GPU can show: products stay exact under TF32 and autocast, and points are drawn there without waiting."""

import pytest
import torch

from diffusion.coordinates import validate_points
from diffusion.mollifier import Mollifier
from diffusion.subsets import draw_points

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("size", [(64, 96), (512, 640)])
def test_mollifier_is_as_exact_as_on_the_cpu(size):
    mollifier = Mollifier(1.0, (64, 64))
    x = torch.randn(2, 3, *size)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            forward, inverse = mollifier(x.cuda()), mollifier.inverse(x.cuda())
    finally:
        torch.set_float32_matmul_precision(precision)
    torch.testing.assert_close(forward.cpu().double(), mollifier(x.double()), rtol=0, atol=2e-6)
    torch.testing.assert_close(inverse.cpu().double(), mollifier.inverse(x.double()), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["uniform", "halton", "sobol"])
def test_points_are_drawn_without_waiting_for_the_device(kind):
    generator = torch.Generator("cuda").manual_seed(0)
    draw_points(kind, generator, 4, (40, 56), 500, "cuda")  # low-discrepancy sequences are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        points = draw_points(kind, generator, 4, (40, 56), 500, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    validate_points(points)
    assert points.index.is_cuda
