"""Sparse downsampling: subsets of points, the convolution between them, and the networks built of both."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.coordinates import CONVENTIONS, Points
from diffusion.subsets import draw_points
from models.coarse_nodes import PointNodes, _farthest_first, _levels, _random_order
from models.grid_unet import GridSpec
from models.operators.dispatch import get_backend
from models.operators.sparse_conv.backend import coverage, kernel_window, resample_kernel
from models.point_conv import PointConv, stencil_between
from models.sparse_unet import SparseSpec
from networks import all_parameters_have_gradients, denoiser, encoder, inputs, random_points

CPU = torch.device("cpu")
CONVENTION = CONVENTIONS["cell_centred"]
BACKEND = get_backend("torch_dense")
SPARSE = SparseSpec(channels=6, num_blocks=1, kernel_size=3)


def grid_spec(nodes: str) -> GridSpec:
    return GridSpec(4, 6, (1, 2), (1, 1), attention_resolutions=(2,), nodes=nodes)


def between_in_loops(conv: PointConv, x, sources: Points, targets: Points, side: int, convention) -> torch.Tensor:
    """bias + 9 / Σ c · Σ weight · x over the window, pair by pair."""
    width, (kernel_shape, span) = sources.size[1], kernel_window(3, sources.size, (side, side), convention)
    weight, covered = (
        resample_kernel(conv.weight, kernel_shape, span),
        coverage(kernel_shape, span or kernel_shape, CPU),
    )
    out = torch.zeros(len(x), targets.count, conv.out_channels, dtype=x.dtype)
    for b in range(len(x)):
        for m, target in enumerate(targets.index[b].tolist()):
            total, count = torch.zeros(conv.out_channels, dtype=x.dtype), 0
            for n, source in enumerate(sources.index[b].tolist()):
                i = source // width - target // width + kernel_shape[0] // 2
                j = source % width - target % width + kernel_shape[1] // 2
                if 0 <= i < kernel_shape[0] and 0 <= j < kernel_shape[1]:
                    count += covered[i, j]
                    total = total + weight[:, :, i, j] @ x[b, n]
            out[b, m] = conv.bias + (9 / count * total if count else 0)
    return out


@pytest.mark.parametrize(
    ("size", "side", "sources", "targets"),
    [((6, 6), 6, 20, 9), ((9, 5), 4, 17, 12), ((8, 13), 2, 5, 30), ((7, 7), 3, 1, 49), ((4, 3), 8, 6, 2)],
)
@pytest.mark.parametrize("name", ["cell_centred", "reference"])
def test_convolution_between_points_is_its_definition(name, size, side, sources, targets):
    torch.manual_seed(0)
    conv = PointConv(3, 4).double()
    sources, targets = random_points(2, size, sources), random_points(2, size, targets)
    x = torch.randn(2, sources.count, 3, dtype=torch.float64)
    stencil = stencil_between(sources, targets, side, CONVENTIONS[name])
    ours = conv(x.unsqueeze(2), stencil).squeeze(2)
    expected = between_in_loops(conv, x, sources, targets, side, CONVENTIONS[name])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "side", "count"), [((12, 12), 12, 144), ((16, 10), 8, 40), ((9, 14), 3, 30)])
def test_within_a_set_it_is_the_sparse_convolution(size, side, count):
    """The back end for the sparse level computes the same, for every pixel of the window."""
    torch.manual_seed(0)
    conv, points = PointConv(3, 4), random_points(2, size, count)
    x = torch.randn(2, count, 3)
    kernel_shape, span = kernel_window(3, size, (side, side), CONVENTION)
    plan = BACKEND.plan(points, 2, kernel_shape, 3, CPU, span)
    expected = BACKEND.conv(x, conv.weight, plan, 1) + conv.bias
    ours = conv(x.unsqueeze(2), stencil_between(points, points, side, CONVENTION)).squeeze(2)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_on_a_whole_grid_it_is_a_convolution_inside():
    torch.manual_seed(0)
    conv, points = PointConv(2, 5), Points((6, 8), torch.arange(48).repeat(1, 1))
    x = torch.randn(1, 2, 6, 8)
    stencil = stencil_between(points, points, 7, CONVENTIONS["reference"])  # whose window is rounded to 3 × 3
    ours = conv(x.flatten(2).transpose(1, 2).unsqueeze(2), stencil)
    expected = F.conv2d(x, conv.weight, conv.bias)
    torch.testing.assert_close(ours.view(1, 6, 8, 5)[:, 1:-1, 1:-1].permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_convolution_between_points():
    torch.manual_seed(0)
    conv, sources, targets = PointConv(2, 3).double(), random_points(2, (7, 5), 9), random_points(2, (7, 5), 4)
    stencil = stencil_between(sources, targets, 3, CONVENTION)
    x = torch.randn(2, 9, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: conv(x, stencil), (x, *conv.parameters()))


def test_a_stencil_serves_a_batch():
    one = random_points(1, (6, 9), 20)
    three = Points(one.size, one.index.repeat(3, 1))
    x = torch.randn(3, 20, 2)
    for other in (stencil_between(one, one, 4, CONVENTION).expand(3), stencil_between(three, three, 4, CONVENTION)):
        expected = torch.cat([stencil_between(one, one, 4, CONVENTION)(x[b : b + 1]) for b in range(3)])
        torch.testing.assert_close(other(x), expected)


def test_random_subsets_follow_from_the_set_alone():
    points = random_points(3, (9, 7), 40)
    order = points.index.gather(1, _random_order(points.index))
    assert torch.equal(order.sort(1).values, points.index.sort(1).values)
    shuffled = points.index[:, torch.randperm(40)]
    assert torch.equal(shuffled.gather(1, _random_order(shuffled)), order)
    changed = points.index[:1, 1:]
    kept = order[0][order[0] != points.index[0, 0]]
    assert not torch.equal(changed.gather(1, _random_order(changed))[0], kept)


def test_random_subsets_look_random():
    """Over many draws of points every pixel is in the subset as often as chance has it, and pairs are not preferred."""
    generator = torch.Generator().manual_seed(0)
    draws, pixels, count, chosen = 4000, 64, 32, 8
    points = draw_points("uniform", generator, draws, (8, 8), count, CPU)
    subset = points.index.gather(1, _random_order(points.index)[:, :chosen])
    taken = torch.zeros(draws, pixels).scatter_(1, subset, 1.0)
    share = chosen / pixels
    deviation = (share * (1 - share) / draws) ** 0.5
    assert (taken.mean(0) - share).abs().max() < 5 * deviation
    pairs = (taken.T @ taken / draws)[~torch.eye(pixels, dtype=torch.bool)]
    together = share * (chosen - 1) / (pixels - 1)
    assert (pairs - together).abs().max() < 6 * (together / draws) ** 0.5


@pytest.mark.parametrize(
    ("size", "count", "picks"), [((7, 5), 20, 8), ((4, 12), 48, 13), ((3, 3), 5, 4), ((5, 5), 9, 0)]
)
def test_equidistant_subsets_are_farthest_first(size, count, picks):
    torch.manual_seed(0)
    points = random_points(2, size, count)
    order = _farthest_first(points, points.index, picks)
    assert torch.equal(order.sort(1).values, torch.arange(count).repeat(2, 1))
    for ids, ours in zip(points.index.tolist(), order.tolist()):
        place = {i: (i // size[1] * size[1], i % size[1] * size[0]) for i in ids}  # unit square times H·W

        def gap(i, j, place=place):
            return (place[i][0] - place[j][0]) ** 2 + (place[i][1] - place[j][1]) ** 2

        chosen = [min(ids)] if picks else []
        while len(chosen) < picks:
            rest = sorted(set(ids) - set(chosen))
            chosen.append(max(rest, key=lambda i, c=tuple(chosen): (min(gap(i, j) for j in c), -i)))
        assert [ids[k] for k in ours[:picks]] == chosen


@pytest.mark.parametrize("kind", ["random", "equidistant"])
def test_levels_are_nested_and_as_large_as_the_grids(kind):
    points = random_points(2, (9, 11), 50)
    counts = [min(50, side**2) for side in (8, 4, 2)]
    chosen, pyramid = _levels(points, kind, (8, 4, 2), counts, CONVENTION, CPU)
    assert chosen.shape == (2, 50)
    x = torch.randn(2, 50, 1)
    for stencils, inputs_, outputs in (
        (pyramid.same, counts, counts),
        (pyramid.down, counts, [*counts[1:], counts[-1]]),
        (pyramid.up, counts, [counts[0], *counts[:-1]]),
    ):
        for stencil, n, m in zip(stencils, inputs_, outputs, strict=True):
            assert stencil(x[:, :n]).shape == (2, m, 9)


@pytest.mark.parametrize("kind", ["random", "equidistant"])
@pytest.mark.parametrize(("size", "count"), [((9, 11), 40), ((6, 5), 12), ((7, 8), None)])
def test_nodes_keep_their_values_and_the_others_take_the_mean_of_the_nearest(kind, size, count):
    torch.manual_seed(0)
    points = Points(size) if count is None else random_points(2, size, count)
    h = torch.randn(2, points.count, 3)
    nodes = PointNodes(points, 2, kind, (4, 2), 3, CONVENTION, CPU)
    inside = nodes.enter(h)
    assert inside.shape == (2, min(16, points.count), 1, 3)
    back = nodes.leave(inside)
    ids = points.ids().expand(2, -1)
    for b in range(2):
        chosen = nodes._nodes.index.expand(2, -1)[b].tolist()
        where = [(i // size[1] * size[1], i % size[1] * size[0]) for i in chosen]  # unit square times H·W, exact
        for m, pixel in enumerate(ids[b].tolist()):
            if pixel in chosen:
                torch.testing.assert_close(back[b, m], h[b, m])
                continue
            row, col = pixel // size[1] * size[1], pixel % size[1] * size[0]
            near = sorted(((row - r) ** 2 + (col - c) ** 2, i, k) for k, ((r, c), i) in enumerate(zip(where, chosen)))
            farthest = near[2][0]  # those tied there share its weight
            near = [entry for entry in near if entry[0] <= farthest]
            before = sum(d < farthest for d, _, _ in near)
            share = (3 - before) / (len(near) - before)
            weights = torch.tensor([(1 if d < farthest else share) / d for d, _, _ in near])
            values = torch.stack([inside[b, k, 0] for _, _, k in near])
            mean = (weights[:, None] * values).sum(0) / weights.sum()
            torch.testing.assert_close(back[b, m], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["random", "equidistant"])
def test_points_all_of_them_and_the_full_lattice_agree(kind):
    network, coder = denoiser(sparse=SPARSE, grid=grid_spec(kind)), encoder(sparse=SPARSE, grid=grid_spec(kind))
    full = Points((7, 6))
    listed = random_points(2, full.size, 42)
    x, t, z = inputs(2, full)
    there = listed.index.unsqueeze(2).expand(-1, -1, 3)
    ours = network(x.gather(1, there), listed, t, z)
    torch.testing.assert_close(ours, network(x, full, t, z).gather(1, there), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coder(x.gather(1, there), listed), coder(x, full), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["random", "equidistant"])
def test_items_of_a_batch_do_not_see_each_other(kind):
    """In float64: norms of nearly equal features magnify the rounding of float32, differently on every processor."""
    network, points = denoiser(sparse=SPARSE, grid=grid_spec(kind)).double(), random_points(3, (9, 7), 30)
    x, t, z = (tensor.double() for tensor in inputs(3, points))
    y = network(x, points, t, z)
    for b in range(3):
        alone, one = Points((9, 7), points.index[b : b + 1]), slice(b, b + 1)
        torch.testing.assert_close(network(x[one], alone, t[one], z[one]), y[one])


@pytest.mark.parametrize("kind", ["random", "equidistant"])
@pytest.mark.parametrize(("size", "count"), [((8, 8), 30), ((5, 11), 10), ((13, 6), None)])
def test_every_parameter_is_trained(kind, size, count):
    network, coder = denoiser(sparse=SPARSE, grid=grid_spec(kind)), encoder(sparse=SPARSE, grid=grid_spec(kind))
    points = Points(size) if count is None else random_points(2, size, count)
    x, t, _ = inputs(2, points)
    network(x, points, t, coder(x, points)).square().sum().backward()
    assert all_parameters_have_gradients(network) == [] and all_parameters_have_gradients(coder) == []


def test_mixed_precision_is_close_to_single():
    network, points = denoiser(sparse=SPARSE, grid=grid_spec("random")), random_points(2, (8, 8), 40)
    x, t, z = inputs(2, points)
    exact = network(x, points, t, z)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, points, t, z)
    assert (rough - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"downsampling is 'strided'; accepted: grid, random, equidistant"):
        grid_spec("strided")
    with pytest.raises(
        ValueError, match=r"uno_conv_type is 'spectral'; accepted: 'conv', with model\.downsampling='random'"
    ):
        GridSpec(4, 6, (1, 2), (1, 1), conv_type="spectral", nodes="random")
