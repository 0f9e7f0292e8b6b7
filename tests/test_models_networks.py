"""Denoiser, encoder and latent network as wholes: shapes, equalities that must hold, gradients, precision, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F

from diffusion.coordinates import Points, gather_points, image_to_points, points_to_image
from models.grid_unet import GridEncoder, GridSpec, GridUNet
from models.latent_mlp import MLPSkipNet
from models.layers import latent_sinusoidal_features
from models.operators.dispatch import use_backend
from models.sparse_encoder import Encoding
from models.sparse_unet import SparseSpec, SparseUNet
from networks import GRID, SPARSE, all_parameters_have_gradients, denoiser, encoder, inputs, random_points, randomised

SPECTRAL = GridSpec(resolution=8, base_channels=4, mults=(1, 1), blocks_per_level=(1, 2), conv_type="spectral")


FULL_KERNELS = SparseSpec(6, 1, 5, depthwise=False, nearest=5)
REFERENCE = SparseSpec(6, 1, 3, convention="reference")


@pytest.mark.parametrize("sparse", [SPARSE, FULL_KERNELS, REFERENCE])
@pytest.mark.parametrize("size", [(8, 8), (7, 11), (16, 4)])
def test_all_points_in_any_order_are_the_full_lattice(sparse, size):
    network, coder = denoiser(sparse=sparse), encoder(sparse=sparse)
    full, shuffled = Points(size), random_points(2, size, size[0] * size[1])
    x, t, z = inputs(2, full)
    shuffled_x = x.gather(1, shuffled.index.unsqueeze(2).expand(-1, -1, 3))
    expected = network(x, full, t, z).gather(1, shuffled.index.unsqueeze(2).expand(-1, -1, 3))
    torch.testing.assert_close(network(shuffled_x, shuffled, t, z), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coder(shuffled_x, shuffled), coder(x, full), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "torch_dense"])
@pytest.mark.parametrize(("size", "count"), [((8, 8), None), ((7, 11), 30), ((24, 40), None)])
def test_evaluating_without_gradients_changes_no_number(backend, size, count):
    """Without gradients some results are written in place: twice the same, and x untouched."""
    network = use_backend(denoiser(sparse=SparseSpec(channels=16, num_blocks=3, kernel_size=5)), backend)
    points = Points(size) if count is None else random_points(2, size, count)
    x, t, z = inputs(2, points)
    kept, expected = x.clone(), network(x, points, t, z)
    with torch.no_grad():
        found = [network(x, points, t, z) for _ in range(2)]
    assert torch.equal(*found) and torch.equal(x, kept)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    ("batch", "size", "count"), [(1, (8, 8), 17), (2, (5, 9), 44), (1, (13, 6), 3), (3, (1, 5), 5)]
)
def test_shapes(channels, batch, size, count):
    network, coder = denoiser(channels, 2 * channels), encoder(channels)
    for points in (random_points(batch, size, count), Points(size)):
        x, t, z = inputs(batch, points, channels)
        assert network(x, points, t, z).shape == (batch, points.count, 2 * channels)
        assert coder(x, points).shape == (batch, 5)


def test_the_order_of_points_does_not_matter():
    network, coder = denoiser(), encoder()
    points = random_points(2, (9, 7), 30)
    x, t, z = inputs(2, points)
    order = torch.randperm(30)
    permuted = Points((9, 7), points.index[:, order])
    torch.testing.assert_close(network(x[:, order], permuted, t, z), network(x, points, t, z)[:, order])
    torch.testing.assert_close(coder(x[:, order], permuted), coder(x, points))


def test_items_of_a_batch_do_not_see_each_other():
    network, coder = denoiser().double(), encoder().double()
    points = random_points(3, (9, 7), 30)
    x, t, z = (tensor.double() for tensor in inputs(3, points))
    y, code = network(x, points, t, z), coder(x, points)
    for b in range(3):
        alone, one = Points((9, 7), points.index[b : b + 1]), slice(b, b + 1)
        torch.testing.assert_close(network(x[one], alone, t[one], z[one]), y[one])
        torch.testing.assert_close(coder(x[one], alone), code[one])


def test_predictions_depend_on_time_latent_and_place():
    network, points = denoiser(), random_points(1, (8, 8), 20)
    x, _, z = inputs(1, points)
    t = torch.tensor([300.0])
    y = network(x, points, t, z)
    moved = Points((8, 8), (points.index + 9) % 64)
    for other in (network(x, points, t + 300, z), network(x, points, t, z + 1), network(x, moved, t, z)):
        assert (other - y).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 48), (24, 72), (72, 72)])
def test_smooth_functions_look_alike_at_every_resolution(size):
    """The same function on a finer lattice gives nearly the same prediction; without resampled kernels it does not."""
    sparse = SparseSpec(channels=6, num_blocks=2, kernel_size=7)
    network, coder = (make(train_size=(24, 24), sparse=sparse) for make in (denoiser, encoder))
    torch.manual_seed(1)
    t, z = torch.tensor([500.0]), torch.randn(1, 5)

    def evaluate(size):
        r, c = ((torch.arange(n) + 0.5) / n for n in size)
        waves = [torch.sin(6 * r)[:, None] + torch.cos(5 * c), r[:, None] * c, (r[:, None] - c) ** 2]
        x, points = image_to_points(torch.stack(waves).unsqueeze(0)), Points(size)
        y = F.adaptive_avg_pool2d(points_to_image(network(x, points, t, z), size), 24)
        return y[:, :, 4:-4, 4:-4], coder(x, points)

    expected, resampled = evaluate((24, 24)), evaluate(size)
    network.train_size = coder.train_size = size  # leaves the kernels as they are
    for reference, right, wrong in zip(expected, resampled, evaluate(size)):
        assert (right - reference).norm() < 0.5 * (wrong - reference).norm()


@pytest.mark.parametrize("grid", [GRID, SPECTRAL])
@pytest.mark.parametrize("z_dim", [5, None])
def test_every_parameter_is_trained(grid, z_dim):
    network, points = denoiser(z_dim=z_dim, grid=grid), random_points(2, (8, 8), 30)
    x, t, z = inputs(2, points, z_dim=z_dim)
    network(x, points, t, z).square().sum().backward()
    assert all_parameters_have_gradients(network) == []


@pytest.mark.parametrize(
    "options", [{}, {"block_norm": False}, {"stochastic": True}, {"grid": SPECTRAL}, {"texture": (2, 1)}]
)
def test_every_parameter_of_the_encoder_is_trained(options):
    coder, points = encoder(**options), random_points(2, (8, 8), 30)
    code = coder(torch.randn(2, 30, 3), points, torch.randn(2, 5))
    (code.z if isinstance(code, Encoding) else code).square().sum().backward()
    assert all_parameters_have_gradients(coder) == []


def test_gradients_are_exact():
    sparse = SparseSpec(channels=3, num_blocks=1, kernel_size=3)
    grid = GridSpec(resolution=2, base_channels=2, mults=(1, 2), blocks_per_level=(1, 1))
    network = denoiser(1, 1, (4, 4), 2, sparse, grid).double()
    coder = encoder(1, (4, 4), sparse, grid).double()
    points = random_points(2, (3, 5), 7)
    x, t, z = (v.double() for v in inputs(2, points, 1, 2))
    assert torch.autograd.gradcheck(
        lambda x, z: network(x, points, t, z), (x.requires_grad_(), z.requires_grad_()), fast_mode=True
    )
    assert torch.autograd.gradcheck(lambda x: coder(x, points), x, fast_mode=True)


@pytest.mark.parametrize("full", [True, False])
def test_mixed_precision_is_close_to_single(full):
    network, coder = denoiser(), encoder(stochastic=True)
    points = Points((8, 8)) if full else random_points(2, (8, 8), 30)
    x, t, z = inputs(2, points)
    noise = torch.randn(2, 5)
    exact, code = network(x, points, t, z), coder(x, points, noise)
    with torch.autocast("cpu", torch.bfloat16):
        y, rough = network(x, points, t, z), coder(x, points, noise)
        y.float().square().mean().backward()
    assert all_parameters_have_gradients(network) == []
    assert (y - exact).square().mean().sqrt() < 0.1 * exact.std()
    for ours, reference in zip(rough, code):
        assert (ours - reference).square().mean().sqrt() < 0.1 * reference.square().mean().sqrt()


def test_dropout_acts_from_its_resolution_down_in_training_only():
    network, points = denoiser(), random_points(1, (8, 8), 30)
    rates = [[block.dropout.p for block in level.blocks] for level in network.grid.downs]
    assert rates == [[0.0], [0.5]]
    assert [level.blocks[0].dropout.p for level in network.grid.ups] == [0.5, 0.0]
    x, t, z = inputs(1, points)
    assert torch.equal(network(x, points, t, z), network(x, points, t, z))
    network.train()
    assert not torch.equal(network(x, points, t, z), network(x, points, t, z))


def test_stochastic_encoder():
    coder, points, noise = encoder(stochastic=True), random_points(2, (8, 8), 30), torch.randn(2, 5)
    x = torch.randn(2, 30, 3)
    code = coder(x, points, noise)
    torch.testing.assert_close(code.z, code.mu + code.logvar.exp().sqrt() * noise)
    assert torch.equal(coder(x, points).z, coder(x, points).mu)


def test_networks_copy_and_reload():
    network, points = denoiser(), random_points(1, (8, 8), 30)
    x, t, z = inputs(1, points)
    fresh = SparseUNet(3, 3, (8, 8), SPARSE, GRID, time_dim=8, z_dim=5).eval()
    fresh.load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), fresh):
        assert torch.equal(other(x, points, t, z), network(x, points, t, z))


def test_inputs_that_do_not_fit():
    network, points = denoiser(), random_points(2, (8, 8), 30)
    x, t, z = inputs(2, points)
    with pytest.raises(ValueError, match=r"knn_neighbours is 3; accepted: 1 to 2, the number of points"):
        network(x[:, :2], Points((8, 8), points.index[:, :2]), t, z)
    with pytest.raises(ValueError, match=r"x has shape \(2, 29, 3\).*\(2, 30, 3\)"):
        network(x[:, 1:], points, t, z)
    with pytest.raises(ValueError, match=r"x has shape \(1, 30, 3\)"):
        encoder()(x[:1], points)
    with pytest.raises(ValueError, match=r"z is None; accepted: \(2, 5\)"):
        network(x, points, t)
    with pytest.raises(ValueError, match=r"z is \(2, 5\); accepted: None"):
        denoiser(z_dim=None)(x, points, t, z)
    with pytest.raises(ValueError, match="coordinate_convention is 'polar'"):
        SparseSpec(4, 1, 3, convention="polar")


def test_grid_networks_by_shape():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 6)
    assert GridUNet(GRID, None, None)(x).shape == (2, 4, 4, 6)
    assert GridEncoder(GRID, 7)(x).shape == (2, 2, 2, 7)
    single = GridSpec(resolution=5, base_channels=6, mults=(2,), blocks_per_level=(1,), attention_resolutions=(5,))
    x = torch.randn(2, 5, 5, 6)
    assert GridUNet(single, None, None)(x).shape == x.shape
    x = torch.randn(1, 8, 8, 4)
    assert GridUNet(SPECTRAL, None, None)(x).shape == x.shape


def test_latent_network_by_its_equations():
    torch.manual_seed(0)
    network, x, t = randomised(MLPSkipNet(5, 8, 4, 6)), torch.randn(3, 5), torch.tensor([0.0, 10.0, 900.0])
    condition = network.time_mlp(latent_sinusoidal_features(t, 6))
    h = x
    for layer in (network.in_layer, *network.layers):
        h = layer.linear(h if h is x else torch.cat([h, x], 1)) * (1 + layer.scale(F.gelu(condition)))
        h = F.gelu(F.layer_norm(h, (8,), layer.norm.weight, layer.norm.bias))
    torch.testing.assert_close(network(x, t), network.out_layer(torch.cat([h, x], 1)))
    assert len(network.layers) == 2
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x, t)
    torch.testing.assert_close(rough.float(), network(x, t), rtol=0.1, atol=0.1)
    assert MLPSkipNet(5, 8, 2, 6, out_channels=10)(x, t).shape == (3, 10)
    for options, field in (((8, 1, 6), "num_layers"), ((8, 2, 1), "time_embed_dim")):
        with pytest.raises(ValueError, match=f"model.{field} is 1; accepted: numbers from 2 on"):
            MLPSkipNet(5, *options)


def test_points_of_an_image():
    """The networks' features are what `gather_points` makes of an image."""
    network, points, image = denoiser(), random_points(2, (8, 8), 30), torch.randn(2, 3, 8, 8)
    t, z = torch.zeros(2), torch.zeros(2, 5)
    x = torch.stack([item.flatten(1).T[index] for item, index in zip(image, points.index)])
    assert torch.equal(network(gather_points(image, points), points, t, z), network(x, points, t, z))
