"""Fréchet and kernel distance, precision and recall: closed forms, hand-made sets, clean-fid and torch-fidelity."""

import math

import numpy as np
import pytest
import torch

from metrics.frechet import Gaussian, frechet_distance, gaussian_of, kernel_distance
from metrics.manifold import precision_recall


def features(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    """Correlated, shifted features."""
    chance = np.random.default_rng(seed)
    mix = chance.normal(size=(dimension, dimension)) / dimension**0.5 + 0.5 * np.eye(dimension)
    return torch.from_numpy(chance.normal(size=(count, dimension)) @ mix + chance.normal(size=dimension)).float()


def gaussian(mean, covariance) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64), 100)


def test_statistics_are_numpy_s():
    x = features(40, 7)
    found = gaussian_of(x)
    torch.testing.assert_close(found.mean, torch.from_numpy(x.double().numpy().mean(axis=0)))
    torch.testing.assert_close(found.covariance, torch.from_numpy(np.cov(x.numpy(), rowvar=False)))


def test_distance_of_commuting_gaussians():
    a = gaussian([0.0, 1.0, 2.0], np.diag([4.0, 1.0, 0.25]).tolist())
    b = gaussian([1.0, 1.0, 0.0], np.diag([1.0, 9.0, 0.25]).tolist())
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (1 - 3) ** 2, rel=1e-14)


@pytest.mark.parametrize("angle", [0.3, 1.0, math.pi / 2])
def test_distance_of_rotated_gaussians(angle):
    """In two dimensions tr (C₁ C₂)^½ = (tr C₁C₂ + 2 √(det C₁ det C₂))^½."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    c1 = np.diag([5.0, 0.3])
    c2 = turn @ np.diag([2.0, 1.0]) @ turn.T
    root = math.sqrt(np.trace(c1 @ c2) + 2 * math.sqrt(np.linalg.det(c1) * np.linalg.det(c2)))
    expected = np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet_distance(gaussian([0, 0], c1.tolist()), gaussian([0, 0], c2.tolist())) == pytest.approx(expected)


def test_distance_of_singular_gaussians():
    across, along = np.diag([1.0, 0.0]).tolist(), np.diag([0.0, 4.0]).tolist()
    assert frechet_distance(gaussian([0, 0], across), gaussian([0, 0], along)) == pytest.approx(5.0)
    assert frechet_distance(gaussian([0, 0], across), gaussian([3, 0], across)) == pytest.approx(9.0)
    zero = np.zeros((2, 2)).tolist()
    assert frechet_distance(gaussian([1, 2], zero), gaussian([1, 0], zero)) == 4.0


def test_fewer_samples_than_dimensions():
    """Two points on each of two orthogonal lines: means 0, variances 2 and 8 of one dimension each."""
    x, y = torch.zeros(2, 300), torch.zeros(2, 300)
    x[:, 10], y[:, 20] = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    assert frechet_distance(gaussian_of(x), gaussian_of(y)) == pytest.approx(10.0, rel=1e-12)
    few = features(20, 300)
    assert frechet_distance(gaussian_of(few), gaussian_of(few)) == pytest.approx(0.0, abs=1e-9)
    shifted = gaussian_of(few + 0.5)
    assert frechet_distance(gaussian_of(few), shifted) == pytest.approx(300 * 0.25, rel=1e-6)


@pytest.mark.parametrize(("count", "dimension"), [(400, 16), (300, 64), (40, 64)])
def test_distance_is_clean_fid_s(count, dimension):
    cleanfid = pytest.importorskip("cleanfid.fid")
    x, y = features(count, dimension, 1), features(count + 7, dimension, 2)
    expected = cleanfid.fid_from_feats(x.numpy().astype(np.float64), y.numpy().astype(np.float64))
    assert frechet_distance(gaussian_of(x), gaussian_of(y)) == pytest.approx(expected, rel=1e-4)


def test_distance_is_torch_fidelity_s():
    theirs = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = features(300, 32, 1).double(), features(300, 32, 2).double()
    first, second = theirs.fid_features_to_statistics(x), theirs.fid_features_to_statistics(y)
    expected = theirs.fid_statistics_to_metric(first, second, False)["frechet_inception_distance"]
    assert frechet_distance(gaussian_of(x), gaussian_of(y)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("reference", "generated"), [(200, 200), (1500, 1200), (300, 1100)])
def test_kernel_distance_is_clean_fid_s(reference, generated):
    cleanfid = pytest.importorskip("cleanfid.fid")
    x, y = features(reference, 24, 1), features(generated, 24, 2)
    np.random.seed(5)  # clean-fid draws from the global generator
    expected = cleanfid.kernel_distance(x.double().numpy(), y.double().numpy(), num_subsets=10)
    found, _ = kernel_distance(x, y, subsets=10, seed=5)
    assert found == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_by_the_definition():
    x, y = features(6, 3, 1).double(), features(5, 3, 2).double()
    x = x[:5]

    def kernel(a, b):
        return float((a @ b / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(5) for j in range(5)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / 20
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 25
    assert kernel_distance(x, y, subsets=3)[0] == pytest.approx(within - 2 * across, rel=1e-12)


@pytest.mark.parametrize(
    ("reference", "generated", "subset_size", "shift"),
    [
        (50, 50, 1000, 0.5),  # one evaluation
        (40, 120, 1000, 0.5),
        (150, 150, 60, 0.3),  # many subsets
        (60, 60, 1000, 0.0),  # equal distributions, where all variance is that of pairs
    ],
)
def test_the_error_of_the_kernel_distance_is_the_spread_over_independent_draws(
    reference, generated, subset_size, shift
):
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(300):
        x = torch.randn(reference, 8, generator=generator)
        y = torch.randn(generated, 8, generator=generator) + shift
        found.append(kernel_distance(x, y, subsets=20, subset_size=subset_size))
    distances, errors = torch.tensor(found, dtype=torch.float64).unbind(1)
    truth = float(distances.std())  # known to 4 %
    # The variance of single images, 0 for equal distributions, is not taken below 0: there the error is a little large.
    assert 0.88 < float(errors.square().mean().sqrt()) / truth < (1.12 if shift else 1.25)
    assert float(errors.min()) > truth / 3


def test_the_error_of_many_images_follows_from_some_of_them(monkeypatch):
    x, y = features(900, 8, 1), features(700, 8, 2)
    _, whole = kernel_distance(x, y, subsets=30)
    monkeypatch.setattr("metrics.frechet._VARIANCE_SIZE", 250)
    monkeypatch.setattr("metrics.frechet._KERNEL_ROWS", 100)
    _, some = kernel_distance(x, y, subsets=30)
    assert some == pytest.approx(whole, rel=0.2)
    assert kernel_distance(x[:3], y)[1] is None


def test_kernel_distance_of_equal_distributions_is_about_zero():
    x = features(2000, 8, 1)
    found, error = kernel_distance(x[:1000], x[1000:], subsets=20, subset_size=300)
    assert abs(found) < 3 * error


def test_precision_and_recall_of_hand_made_sets():
    line = torch.arange(10.0)[:, None]
    assert precision_recall(line, line + 0.25) == (1.0, 1.0)
    assert precision_recall(line, line + 1000) == (0.0, 0.0)
    narrow = 4 + 0.01 * torch.arange(10.0)[:, None]  # faithful, but all alike
    assert precision_recall(line, narrow) == (1.0, 0.1)
    half = torch.cat([line[:5], 1000 + line[:5]])  # half of it off; its balls of 3 neighbours end near 7
    precision, recall = precision_recall(line, half)
    assert precision == 0.5 and recall == 0.8


def test_a_ball_is_closed_and_leaves_out_its_own_centre():
    square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    outside = torch.tensor([[2.0, 0.0], [-1.01, 0.0], [9.0, 9.0], [8.0, 8.0]])
    assert precision_recall(square, outside, k=1)[0] == 0.25


def test_precision_and_recall_are_torch_fidelity_s():
    theirs = pytest.importorskip("torch_fidelity.metric_prc")
    x, y = features(230, 12, 1), features(180, 12, 1) * 0.8 + 0.1
    expected = theirs.calculate_precision_recall_full(y, x, 3)
    assert precision_recall(x, y) == pytest.approx(expected, abs=1e-6)
    assert 0 < min(expected) < max(expected) < 1


def test_precision_and_recall_do_not_depend_on_the_parts(monkeypatch):
    x, y = features(50, 6, 1), features(40, 6, 1) + 0.2
    whole = precision_recall(x, y)
    monkeypatch.setattr("metrics.manifold._CHUNK", 120)
    assert precision_recall(x, y) == whole


def test_bad_features_are_refused():
    x = features(10, 4)
    with pytest.raises(ValueError, match="at least 2 images"):
        gaussian_of(x[:1])
    with pytest.raises(ValueError, match="not finite"):
        gaussian_of(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        frechet_distance(gaussian_of(x), gaussian_of(x[:, :3]))
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        kernel_distance(x, x[:, :3])
    with pytest.raises(ValueError, match="more than k=3"):
        precision_recall(x, x[:3])
