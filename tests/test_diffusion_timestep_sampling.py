"""Draws of the diffusion step: fair, unbiased when weighted, and resumable."""

import collections
import math
import statistics

import pytest
import torch

from diffusion.schedules import Schedule
from diffusion.timestep_sampling import LogNormalTimesteps, LossAwareTimesteps, UniformTimesteps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def warmed_up(losses, history=4, **options):
    sampler = LossAwareTimesteps(len(losses), history=history, **options)
    for _ in range(history):
        sampler.update(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_uniform():
    t, weights = UniformTimesteps(5).sample(generator(), 10_000, "cpu")
    assert t.dtype == torch.int64 and torch.equal(weights, torch.ones(10_000))
    assert (torch.bincount(t, minlength=5) / 10_000 - 0.2).abs().max() < 0.02


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_log_normal_steps_have_the_quantiles_of_a_normal_log_snr(name):
    log_snr = Schedule.create(name, 1000, 32).log_snr
    t, weights = LogNormalTimesteps(log_snr, mean=1.0, deviation=2.0, uniform=0.0).sample(generator(), 100_000, "cpu")
    assert torch.equal(weights, torch.ones(100_000)) and t.dtype == torch.int64
    drawn, normal = log_snr[t], statistics.NormalDist(1.0, 2.0)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert float(drawn.quantile(share)) == pytest.approx(normal.inv_cdf(share), abs=0.06)
    sampler = LogNormalTimesteps(log_snr)
    assert sampler.probabilities().sum() == pytest.approx(1) and sampler.probabilities().min() >= 0.1 / 1000


def test_loss_aware_is_uniform_until_every_step_is_known():
    sampler = LossAwareTimesteps(4, history=2)
    sampler.update(torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]), torch.arange(8.0))
    torch.testing.assert_close(sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))
    sampler.update(torch.tensor([3]), torch.tensor([9.0]))
    # The last two losses of each step: (1, 2), (3, 4), (5, 6), (7, 9).
    wanted = torch.tensor([math.sqrt((a * a + b * b) / 2) for a, b in ((1, 2), (3, 4), (5, 6), (7, 9))]).double()
    torch.testing.assert_close(sampler.probabilities(), 0.999 * wanted / wanted.sum() + 0.00025)


def test_weighted_losses_are_unbiased():
    losses = torch.tensor([0.1, 2.0, 0.5, 0.0, 7.0])
    sampler = warmed_up(losses.tolist(), uniform_probability=0.1)
    exact = float((sampler.probabilities() * (losses / (5 * sampler.probabilities()))).sum())
    t, weights = sampler.sample(generator(), 200_000, "cpu")
    values = weights * losses[t]
    assert values.mean() == pytest.approx(exact, abs=5 * values.std().item() / math.sqrt(200_000))
    assert exact == pytest.approx(losses.mean().item())
    uniform = losses[torch.randint(5, (200_000,), generator=generator())]
    assert values.std() < 0.5 * uniform.std()


def test_losses_that_are_not_finite_are_ignored():
    sampler = warmed_up([1.0, 2.0, 3.0])
    before = sampler.probabilities()
    sampler.update(torch.tensor([0, 1]), torch.tensor([math.nan, math.inf]))
    assert torch.equal(sampler.probabilities(), before)


def test_vanishing_losses_fall_back_to_uniform():
    assert torch.equal(warmed_up([0.0, 0.0]).probabilities(), torch.tensor([0.5, 0.5]).double())


@pytest.mark.parametrize("processes", [1, 3])
def test_losses_are_recorded_one_after_the_other(processes):
    """As a list for each step would keep them, with steps that come more often at once than it is long."""
    draws, history, kept = torch.Generator().manual_seed(2), 3, [collections.deque(maxlen=3) for _ in range(4)]
    sampler = LossAwareTimesteps(4, history=history, uniform_probability=0.1, gather=lambda own: everyones)
    for _ in range(7):
        t = torch.randint(4, (processes, 9), generator=draws)
        losses = torch.rand(processes, 9, generator=draws)
        losses[losses > 0.9] = math.nan
        everyones = torch.stack([t.double(), losses.double()], dim=1)
        sampler.update(t[0], losses[0])
        for step, loss in zip(t.flatten().tolist(), losses.flatten().double().tolist()):
            if math.isfinite(loss):
                kept[step].append(loss)
    wanted = torch.tensor([math.sqrt(sum(x * x for x in losses) / history) for losses in kept], dtype=torch.float64)
    torch.testing.assert_close(sampler.probabilities(), 0.9 * wanted / wanted.sum() + 0.025)


def test_steps_come_as_often_as_they_should():
    sampler = warmed_up([0.0, 1.0, 3.0, 0.0, 4.0], uniform_probability=1e-9)
    t, _ = sampler.sample(generator(), 100_000, "cpu")
    torch.testing.assert_close(torch.bincount(t, minlength=5) / 1e5, sampler.probabilities().float(), rtol=0, atol=0.01)
    assert sampler.sample(generator(), 1, "cpu")[0].shape == (1,)


def test_state_is_restored_exactly():
    sampler = warmed_up([1.0, 2.0, 3.0])
    sampler.update(torch.tensor([1]), torch.tensor([8.0]))
    state = sampler.state_dict()
    restored = LossAwareTimesteps(3, history=4)
    restored.load_state_dict(state)
    sampler.update(torch.tensor([1]), torch.tensor([100.0]))
    assert not torch.equal(restored.probabilities(), sampler.probabilities())  # no shared memory
    restored.update(torch.tensor([1]), torch.tensor([100.0]))
    assert torch.equal(restored.probabilities(), sampler.probabilities())
    for x, y in zip(sampler.sample(generator(3), 50, "cpu"), restored.sample(generator(3), 50, "cpu")):
        assert torch.equal(x, y)
    UniformTimesteps(3).load_state_dict(UniformTimesteps(3).state_dict())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="are 0, 10"):
        LossAwareTimesteps(0)
    with pytest.raises(ValueError, match=r"losses of the timestep sampler is \(3, 10\)"):
        LossAwareTimesteps(4).load_state_dict(LossAwareTimesteps(3).state_dict())
    with pytest.raises(ValueError, match="missing"):
        LossAwareTimesteps(4).load_state_dict({})
    with pytest.raises(ValueError, match="counts"):
        UniformTimesteps(4).load_state_dict(LossAwareTimesteps(4).state_dict())
