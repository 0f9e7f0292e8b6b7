"""The kernels of the ablations: conv, activation, conv, and a kernel that is a network of the offset."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.coordinates import Points
from models.continuous_kernel import ContinuousKernel
from models.operators.dispatch import get_backend, use_backend
from models.operators.sparse_conv.backend import resample_kernel, resampled_shape
from models.sparse_block import SparseBlock
from networks import random_points, randomised

CPU = torch.device("cpu")
BACKEND = get_backend("torch_dense")


def block_and_inputs(size, train_size=(5, 6), **options):
    torch.manual_seed(0)
    block = randomised(use_backend(SparseBlock(4, 3, train_size=train_size, **options), BACKEND)).double()
    points = random_points(2, size, 14)
    x = torch.randn(2, 14, 4, dtype=torch.float64, requires_grad=True)
    return block, x, BACKEND.plan(points, 2, resampled_shape(3, size, train_size), 3, CPU)


def values_in_loops(kernel: ContinuousKernel, size, kernel_shape) -> torch.Tensor:
    """The network, one offset at a time, with its equations written out."""
    first, second, last = kernel.layers
    out = torch.zeros(*kernel.shape, *kernel_shape)
    for i in range(kernel_shape[0]):
        for j in range(kernel_shape[1]):
            offset = ((i - kernel_shape[0] // 2) / size[0], (j - kernel_shape[1] // 2) / size[1])  # in the unit square
            half = [kernel.kernel_size / (2 * n) for n in kernel.train_size]
            u = torch.tensor([offset[0] / half[0], offset[1] / half[1]])
            h = torch.sin(first.weight @ u + first.bias)
            h = torch.sin(second.weight @ h + second.bias)
            out[:, :, i, j] = (last.weight @ h + last.bias).view(kernel.shape)
    return out


@pytest.mark.parametrize(("shape", "size"), [((3, 1), (5, 8)), ((2, 2), (7, 4)), ((4, 1), (17, 9))])
def test_continuous_kernel_by_its_equations(shape, size):
    torch.manual_seed(0)
    kernel = ContinuousKernel(shape, 5, (7, 6), 0.1)
    kernel_shape = resampled_shape(5, size, (7, 6))
    torch.testing.assert_close(
        kernel(size, kernel_shape), values_in_loops(kernel, size, kernel_shape), rtol=1e-4, atol=1e-5
    )


def test_continuous_kernel_is_one_function_on_every_lattice():
    """Every third tap on a lattice three times as fine is a tap of the training lattice; a resampled table is not."""
    torch.manual_seed(0)
    kernel = ContinuousKernel((3, 1), 5, (8, 6), 0.1)
    coarse, kernel_shape = kernel((8, 6), (5, 5)), resampled_shape(5, (24, 18), (8, 6))
    assert kernel_shape == (15, 15)
    fine = kernel((24, 18), kernel_shape)
    torch.testing.assert_close(fine[:, :, 1::3, 1::3], coarse)
    steps = (fine[:, :, 1:] - fine[:, :, :-1]).abs().max()
    assert steps < (coarse[:, :, 1:] - coarse[:, :, :-1]).abs().max()  # it is smooth between them
    table = resample_kernel(coarse, (9, 9))
    assert (kernel((16, 12), (9, 9)) - table).abs().max() > 1e-3


def test_continuous_kernel_starts_as_spread_as_a_table():
    torch.manual_seed(0)
    values = ContinuousKernel((4096, 1), 7, (16, 16), 0.02)((16, 16), (7, 7))
    assert values.std().item() == pytest.approx(0.02 / math.sqrt(3), rel=0.1)
    assert values.std(dim=(2, 3)).mean() > 0.7 * values.std()  # within a kernel, not only from one to the next
    assert values.mean().abs() < 0.001


@pytest.mark.parametrize("size", [(5, 6), (11, 5)])
@pytest.mark.parametrize("depthwise", [True, False])
def test_block_with_a_continuous_kernel_is_one_with_its_values(size, depthwise):
    block, x, plan = block_and_inputs(size, kernel="continuous", depthwise=depthwise)
    c = BACKEND.conv(F.layer_norm(x, (4,), block.norm1.weight, block.norm1.bias),
                     block.kernel(size, plan.kernel_shape), plan, 4 if depthwise else 1)  # fmt: skip
    h = F.layer_norm(x + c, (4,), block.norm2.weight, block.norm2.bias)
    torch.testing.assert_close(block(x, plan), x + c + block.mlp(h))


@pytest.mark.parametrize("norm", [True, False])
def test_block_with_a_nonlinear_kernel_is_conv_activation_conv(norm):
    block, x, plan = block_and_inputs((7, 4), kernel="nonlinear", norm=norm)
    h = F.layer_norm(x, (4,), block.norm1.weight, block.norm1.bias) if norm else x
    c = BACKEND.conv(F.gelu(BACKEND.conv(h, block.kernel, plan, 4)), block.second_kernel, plan, 4)
    h = F.layer_norm(x + c, (4,), block.norm2.weight, block.norm2.bias) if norm else c
    torch.testing.assert_close(block(x, plan), x + c + block.mlp(h))


def test_only_the_nonlinear_kernel_is_not_linear():
    for kernel, is_linear in (("linear", True), ("continuous", True), ("nonlinear", False)):
        block, x, plan = block_and_inputs((7, 4), kernel=kernel)
        doubled, single = block._integral(2 * x, plan), block._integral(x, plan)
        assert torch.allclose(doubled, 2 * single) == is_linear


@pytest.mark.parametrize("kernel", ["nonlinear", "continuous"])
@pytest.mark.parametrize("depthwise", [True, False])
def test_gradients(kernel, depthwise):
    block, x, plan = block_and_inputs((5, 7), kernel=kernel, depthwise=depthwise)
    parameters = [p for name, p in block.named_parameters() if "kernel" in name]
    assert torch.autograd.gradcheck(lambda x, *_: block(x, plan), (x, *parameters), fast_mode=True)


def test_parameters_of_the_kernels():
    plain = sum(p.numel() for p in SparseBlock(64, 7).parameters())
    nonlinear = sum(p.numel() for p in SparseBlock(64, 7, kernel="nonlinear").parameters())
    assert nonlinear - plain == 64 * 49
    continuous = SparseBlock(64, 7, kernel="continuous", train_size=(8, 8))
    assert sum(p.numel() for p in continuous.kernel.parameters()) == 3 * 32 + 33 * 32 + 33 * 64


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match=r"model\.kernel is 'square'; accepted: linear, nonlinear, continuous"):
        SparseBlock(4, 3, kernel="square")
    with pytest.raises(ValueError, match="train_size"):
        SparseBlock(4, 3, kernel="continuous")


def test_full_lattice_and_all_points_agree():
    for kernel in ("nonlinear", "continuous"):
        block, _, _ = block_and_inputs((4, 7), kernel=kernel)
        x, kernel_shape = torch.randn(2, 28, 4, dtype=torch.float64), resampled_shape(3, (4, 7), (5, 6))
        indices = (None, torch.arange(28).repeat(2, 1))
        full, listed = (BACKEND.plan(Points((4, 7), index), 2, kernel_shape, 3, CPU) for index in indices)
        torch.testing.assert_close(block(x, full), block(x, listed))
