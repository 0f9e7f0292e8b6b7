"""Lattices too large to hold at once: the networks in tiles against the networks on the whole."""

import dataclasses
import itertools

import pytest
import torch

from diffusion.coordinates import Points
from models.grid_unet import GridSpec
from models.operators.dispatch import use_backend
from models.rectangles import Rectangle, tiling
from models.sparse_encoder import SparseEncoder
from models.sparse_unet import SparseSpec, SparseUNet

GRID = GridSpec(resolution=4, base_channels=6, mults=(1, 2), blocks_per_level=(1, 1))
TRAIN = (32, 32)
SPARSE = SparseSpec(channels=16, num_blocks=2, kernel_size=3)
CASES = [  # the back end and other changes, lattice, most points
    ({}, (40, 56), 700),
    ({}, (81, 63), 1700),
    ({"backend": "torch_dense"}, (32, 32), 200),
    ({"kernel_size": 5, "num_blocks": 1}, (20, 70), 500),  # coarser along one axis
    ({"convention": "reference"}, (37, 60), 900),
    ({"kernel": "nonlinear", "num_blocks": 1}, (33, 48), 640),
    ({"kernel": "continuous"}, (64, 40), 1000),
    ({"depthwise": False, "nearest": 5}, (50, 32), 640),
]


def networks(spec, backend="auto"):
    """The denoiser and the encoder of a specification, with parameters that leave no norm an identity."""
    torch.manual_seed(0)
    made = [SparseUNet(3, 3, TRAIN, spec, GRID, time_dim=8, z_dim=5), SparseEncoder(3, 5, TRAIN, spec, GRID)]
    with torch.no_grad():
        for parameter in itertools.chain(*(network.parameters() for network in made)):
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return [use_backend(network.eval(), backend) for network in made]


@torch.no_grad()
@pytest.mark.parametrize(("changes", "size", "most"), CASES, ids=str)
def test_tiles_give_what_the_whole_gives(changes, size, most, monkeypatch):
    backend = changes.get("backend", "auto")
    spec = dataclasses.replace(SPARSE, **{name: value for name, value in changes.items() if name != "backend"})
    whole, whole_encoder = networks(spec, backend)
    tiled, tiled_encoder = networks(dataclasses.replace(spec, tile_points=most), backend)
    x, t, z = torch.randn(2, size[0] * size[1], 3), torch.tensor([10.0, 800.0]), torch.randn(2, 5)
    expected, latents = whole(x, Points(size), t, z), whole_encoder(x, Points(size))
    planned, plan = [], type(tiled.backend).plan
    monkeypatch.setattr(type(tiled.backend), "plan", lambda self, p, *a: planned.append(p) or plan(self, p, *a))
    for found, wanted in ((tiled(x, Points(size), t, z), expected), (tiled_encoder(x, Points(size)), latents)):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    assert len(planned) > 4 and max(points.count for points in planned) <= most


def test_only_full_lattices_without_gradients_are_cut(monkeypatch):
    network = networks(dataclasses.replace(SPARSE, tile_points=30))[0]
    some = Points((8, 8), torch.arange(40).unsqueeze(0))
    assert network.needs_tiles(Points((8, 8)))
    assert not network.needs_tiles(Points((5, 6)))
    assert not network.needs_tiles(some)
    monkeypatch.setattr("models.tiled.evaluate", lambda *_: pytest.fail("in tiles"))
    assert network(torch.randn(1, 64, 3), Points((8, 8)), torch.zeros(1), torch.randn(1, 5)).requires_grad


@pytest.mark.parametrize("lattice", [(1, 1), (40, 40), (37, 100), (300, 7)])
@pytest.mark.parametrize("margin", [(0, 0), (2, 3), (9, 1)])
def test_tiles_cover_the_lattice_once_and_fit(lattice, margin):
    budget = 30 * 20
    covered = torch.zeros(lattice, dtype=torch.int64)
    for tile in tiling(lattice, margin, budget):
        window = tile.grown(margin, lattice)
        assert window.size[0] * window.size[1] <= budget
        covered[tile.top : tile.bottom, tile.left : tile.right] += 1
        assert window.shrunk(margin, lattice).grown(margin, lattice) == window
    assert bool((covered == 1).all())


def test_a_lattice_that_fits_is_one_tile():
    assert tiling((20, 30), (5, 5), 600) == (Rectangle(0, 20, 0, 30),)


def test_windows_larger_than_the_budget_are_an_error():
    with pytest.raises(ValueError, match=r"tile_points is 100; accepted: 231 or more at 200x300 pixels"):
        tiling((200, 300), (5, 10), 100)


def test_cutting_a_window_is_slicing_the_image():
    image = torch.randn(2, 9, 11, 3)
    outer, inner = Rectangle(1, 8, 2, 11), Rectangle(3, 7, 2, 9)
    cut = inner.cut(image[:, 1:8, 2:11].flatten(1, 2), outer)
    assert torch.equal(cut, image[:, 3:7, 2:9].flatten(1, 2))
    assert torch.equal(image.flatten(1, 2)[:, inner.ids(11, torch.device("cpu"))], cut)
