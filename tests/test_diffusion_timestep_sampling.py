"""Draws of the diffusion step: fair, unbiased when weighted, and resumable."""

import math

import pytest
import torch

from diffusion.timestep_sampling import LossAwareTimesteps, UniformTimesteps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def warmed_up(losses, history=4, **options):
    sampler = LossAwareTimesteps(len(losses), history, **options)
    for _ in range(history):
        sampler.update(torch.arange(len(losses)), torch.tensor(losses))
    return sampler


def test_uniform():
    t, weights = UniformTimesteps(5).sample(generator(), 10_000, "cpu")
    assert t.dtype == torch.int64 and torch.equal(weights, torch.ones(10_000))
    assert (torch.bincount(t, minlength=5) / 10_000 - 0.2).abs().max() < 0.02


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


def test_state_is_restored_exactly():
    sampler = warmed_up([1.0, 2.0, 3.0])
    sampler.update(torch.tensor([1]), torch.tensor([8.0]))
    state = sampler.state_dict()
    restored = LossAwareTimesteps(3, 4)
    restored.load_state_dict(state)
    sampler.update(torch.tensor([1]), torch.tensor([100.0]))
    assert not torch.equal(restored.probabilities(), sampler.probabilities())  # no shared memory
    restored.update(torch.tensor([1]), torch.tensor([100.0]))
    assert torch.equal(restored.probabilities(), sampler.probabilities())
    for x, y in zip(sampler.sample(generator(3), 50, "cpu"), restored.sample(generator(3), 50, "cpu")):
        assert torch.equal(x, y)
    UniformTimesteps(3).load_state_dict(UniformTimesteps(3).state_dict())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_steps 0"):
        LossAwareTimesteps(0)
    with pytest.raises(ValueError, match=r"losses is \(3, 10\)"):
        LossAwareTimesteps(4).load_state_dict(LossAwareTimesteps(3).state_dict())
    with pytest.raises(ValueError, match="missing"):
        LossAwareTimesteps(4).load_state_dict({})
    with pytest.raises(ValueError, match="counts"):
        UniformTimesteps(4).load_state_dict(LossAwareTimesteps(4).state_dict())
