"""How a saved model samples, chosen by scores and stored with it."""

import json
from types import SimpleNamespace

import pytest
import torch

from configs.schema import ImageConfig, LatentConfig
from diffusion.mollifier import InverseSnr
from experiments import choose_sampling
from experiments.support import commands
from infty_diff import InftyDiff, SamplingOptions
from infty_diff.filter_file import filter_path, load_filter, save_filter
from infty_diff.loading import store_sampling
from runtime.lock import FolderLock
from runtime.saved import saved_config
from runtime.stored import config_from, read_header
from runtime.weights import load_weights
from test_generation import build


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved model whose images a filter makes."""
    return build(tmp_path / "runs").save(tmp_path / "saved")


def test_the_choice_is_stored(saved, tmp_path, monkeypatch, capsys):
    """With distances that are given: the least are of dpmpp, of 3 steps, and of the filter 0.3."""
    drawn = []

    def sample(folder, model, *options):
        with pytest.raises(ValueError, match="in use by"), FolderLock(tmp_path / "out"):
            pass
        drawn.append(dict(option.removeprefix("--").split("=") for option in options))

    def score(folder, report, reference):
        assert reference == []
        some = drawn[-1]
        distance = 5 + (some["sampler"] == "ddim") + ("3" not in some["sampling_steps"]) - (some["inv_snr"] == "0.3")
        return {"fid": distance, "floor": None, "kid": 0.1, "precision": 0.5, "recall": None, "num_reference": 9}

    for name, fake in {"sample": sample, "score": score, "require_extractor": lambda: None}.items():
        monkeypatch.setattr(choose_sampling, name, fake)
    given = SimpleNamespace(
        samplers=["ddim", "dpmpp"], steps=["2", "3"], filters=["0.05", "0.3"], within=0.0, saved_model=str(saved),
        num_samples=2, model="random_features", split="val", write=True, out_dir=str(tmp_path / "out"),
        latent_sampling_steps=None,
    )  # fmt: skip
    for module in (choose_sampling, commands):
        monkeypatch.setattr(module, "FLAGS", given)
    configs = {"config": saved_config(saved, LatentConfig), "decoder_config": saved_config(saved, ImageConfig)}
    before = load_weights(saved / "image.safetensors")[0]
    choose_sampling.main(SimpleNamespace(arguments=lambda *_: []), configs)
    assert [(some["sampler"], some["sampling_steps"], some["inv_snr"]) for some in drawn] == [
        ("ddim", "2", "0.05"), ("ddim", "3", "0.05"), ("dpmpp", "logsnr2", "0.05"), ("dpmpp", "logsnr3", "0.05"),
        ("dpmpp", "logsnr3", "0.3"),
    ]  # fmt: skip
    assert InftyDiff.from_runs(saved, device="cpu").sampling == SamplingOptions(3, "dpmpp", inv_snr=0.3)
    after = load_weights(saved / "image.safetensors")[0]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "dpmpp *" in capsys.readouterr().out
    given.latent_sampling_steps = "4"
    with pytest.raises(SystemExit):
        choose_sampling.main(SimpleNamespace(arguments=lambda *_: []), configs)
    assert "holds results of other latent_steps" in capsys.readouterr().err


def test_the_fewest_steps_near_the_least_distance_are_best(monkeypatch):
    monkeypatch.setattr(choose_sampling, "FLAGS", SimpleNamespace(within=0.02))
    search = object.__new__(choose_sampling.Search)
    distances = {"5": 12.0, "10": 10.15, "25": 10.0, "50": 10.01}
    search.rows = {SamplingOptions(steps): {"fid": fid} for steps, fid in distances.items()}
    search.cost = lambda options: int(options.steps)
    assert search.best(list(search.rows)).steps == "10"
    choose_sampling.FLAGS.within = 0.0
    assert search.best(list(search.rows)).steps == "25"


def test_a_calibrated_filter_stays_with_the_weights(saved):
    file = saved / "image.safetensors"
    config = config_from(read_header(file)["config"], ImageConfig, str(file))
    mollifier, ratios = InftyDiff.from_runs(saved, device="cpu").process.mollifier, InverseSnr(0.5, (0.1, 0.2))
    with pytest.raises(ValueError, match="inv_snr is calibrated"):
        store_sampling(file, SamplingOptions(inv_snr="calibrated"))
    save_filter(file, mollifier, ratios, {"images": 7})
    store_sampling(file, SamplingOptions("9", inv_snr="calibrated"))
    assert load_filter(file, mollifier) == ratios and json.loads(filter_path(file).read_text())["images"] == 7
    model = InftyDiff.from_runs(saved, device="cpu")
    assert model.sampling == SamplingOptions("9", inv_snr="calibrated") and model.config.model == config.model
