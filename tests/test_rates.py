"""Learning-rate schedules in closed form, and in both stages: through resumes, and with another number of steps."""

import json
import math
import os
import signal
from itertools import pairwise

import pytest
import torch

import micro
from configs.defaults import image_config, latent_config
from configs.schema import ImageConfig, LatentConfig
from configs.validate import ConfigError, freeze
from diffusion.losses import min_snr_weight
from test_training import everything, image_trainer, latent_trainer, metrics
from training.rates import rate_factor

COSINE = {"optimizer.schedule": "cosine", "optimizer.warmup_steps": 2}
ROOT = {"optimizer.schedule": "inverse_sqrt", "optimizer.schedule_ref_steps": 2}


def rates(schedule: str, total: int, warmup: int = 0, reference: int = 1000) -> list[float]:
    return [rate_factor(schedule, k, total, warmup, reference) for k in range(total + 1)]


def test_constant_is_the_warm_up_alone():
    assert rates("constant", 5) == [1] * 6
    assert rates("constant", 5, warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_cosine_falls_from_one_to_zero():
    found = rates("cosine", 100)
    assert found[0] == 1 and found[50] == pytest.approx(0.5) and found[100] == pytest.approx(0, abs=1e-12)
    assert found[25] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert all(a > b for a, b in pairwise(found))
    warm = rates("cosine", 100, warmup=20)
    assert warm[:20] == pytest.approx([(k + 1) / 20 for k in range(20)]) and warm[20] == 1
    assert warm[60] == pytest.approx(0.5) and warm[40] == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert rates("cosine", 3, warmup=9) == pytest.approx([1 / 9, 2 / 9, 3 / 9, 4 / 9])  # nothing is left to fall over
    assert rate_factor("cosine", 300, 100, 20, 1) == pytest.approx(0, abs=1e-12)  # and it does not rise again


def test_inverse_square_root_begins_at_the_reference():
    found = rates("inverse_sqrt", 4000, reference=1000)
    assert found[:1001] == [1] * 1001 and found[4000] == 0.5 and found[2250] == pytest.approx(2 / 3)
    assert rates("inverse_sqrt", 4, warmup=2, reference=1) == pytest.approx([0.5, 1, 0.5**0.5, 3**-0.5, 0.5])


def test_another_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is 'linear'; accepted: constant, cosine, inverse_sqrt"):
        rate_factor("linear", 0, 1, 0, 1)
    for config, cls in ((image_config(), ImageConfig), (latent_config(), LatentConfig)):
        assert config.optimizer.schedule == "constant" and config.diffusion.loss_weight == "none"
        config.optimizer.schedule = "cosin"
        config.diffusion.min_snr_gamma = -1.0
        with pytest.raises(ConfigError) as error:
            freeze(config, cls)
        assert error.value.faults[1] == (
            "config.optimizer.schedule is 'cosin'; accepted: constant, cosine, inverse_sqrt; did you mean cosine?"
        )
        config.optimizer.schedule, config.diffusion.min_snr_gamma = "cosine", 0.0
        with pytest.raises(ConfigError, match=r"config.diffusion.min_snr_gamma is 0.0; accepted: a number > 0"):
            freeze(config, cls)


@pytest.mark.parametrize("changes", [COSINE, ROOT], ids=["cosine", "inverse_sqrt"])
@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
def test_an_interrupted_run_takes_the_same_rates_and_steps(tmp_path, make, changes):
    whole = make(tmp_path / "whole", changes)
    whole.run()
    first = make(tmp_path / "parts", changes)
    step = first.train_step

    def interrupted(batch):
        step(batch)
        if first.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    first.train_step = interrupted
    with pytest.raises(SystemExit):
        first.run()
    second = make(tmp_path / "parts", changes)
    second.run()
    logged = [line["learning_rate"] for line in metrics(second)]
    options = second.config.optimizer
    decay = [0.5, 1, *(0.5 * (1 + math.cos(math.pi * p / 4)) for p in range(4))]
    wanted = decay if changes is COSINE else [1, 1, 1, *((2 / k) ** 0.5 for k in (3, 4, 5))]
    assert logged == pytest.approx([options.learning_rate * part for part in wanted])
    assert logged == [line["learning_rate"] for line in metrics(whole)]
    expected, found = everything(whole), everything(second)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_a_longer_run_takes_the_cosine_of_its_own_length(tmp_path):
    image_trainer(tmp_path, {**COSINE, "train.steps": 3}).run()
    longer = image_trainer(tmp_path, COSINE)
    longer.run()
    parts = [line["learning_rate"] / 1e-3 for line in metrics(longer)]
    assert parts == pytest.approx([0.5, 1, 1, *(0.5 * (1 + math.cos(math.pi * p / 4)) for p in (1, 2, 3))])
    (entry,) = [json.loads(line) for line in (longer.run_dir.path / "history.jsonl").read_text().splitlines()]
    assert entry["changed"] == {"train.steps": [3, 6]}


@pytest.mark.parametrize("prediction", ["xstart", "epsilon", "v"])
@pytest.mark.parametrize("make", [image_trainer, latent_trainer])
def test_both_stages_weigh_their_loss_and_the_held_out_one(tmp_path, make, prediction):
    """One example at a time, the weighted loss is the plain one times the weight of the step that was drawn."""
    changes = {"diffusion.model_mean_type": prediction}
    weighted = {**changes, "diffusion.loss_weight": "min_snr", "diffusion.min_snr_gamma": 2.0}
    plain, other = make(tmp_path / "a", changes), make(tmp_path / "b", weighted)
    batch, loss_type = next(plain.stage.batches(0))[:1], plain.config.diffusion.loss_type
    assert {image_trainer: "mse", latent_trainer: "l1"}[make] == loss_type
    for seed in range(4):
        losses = []
        for trainer in (plain, other):
            torch.manual_seed(seed)  # of dropout
            draws = trainer.stage.draw(torch.Generator().manual_seed(seed), 1)
            with torch.no_grad():
                losses.append(trainer.stage.loss(batch, draws)[0])
        expected, found = losses
        weight = min_snr_weight(other.stage.process, draws["t"], 2.0, loss_type)
        assert float(found) == pytest.approx(float(weight) * float(expected), rel=1e-5)
    held_out = [t.stage.held_out_loss(t.ema.modules) for t in (plain, other)]
    assert held_out[0] != pytest.approx(held_out[1], rel=1e-3)


def test_the_latent_configuration_is_checked_too(tmp_path):
    assert micro.latent(tmp_path, {"diffusion.loss_weight": "min_snr"}).diffusion.min_snr_gamma == 5.0
