"""Which weights of a run are loaded: the newest average, or the best on held-out data."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import micro
from infty_diff.encodings import load_or_encode
from infty_diff.model import InftyDiff
from runtime.files import file_digest
from runtime.stored import weights_path
from runtime.weights import load_weights, save_weights
from test_commands import ROOT, fails, run
from test_generation import stored


@pytest.fixture
def runs(tmp_path) -> Path:
    """Both runs, the best weights of each half of the newest."""
    model = stored(tmp_path)
    networks = {"encoder": model.encoder, "denoiser": model.denoiser}
    halved = {f"{n}.{k}": v / 2 for n, module in networks.items() for k, v in module.state_dict().items()}
    save_weights(tmp_path / "micro" / "best_weights.safetensors", halved, {"config": asdict(model.config)})
    tensors = {name: value / 2 for name, value in model.prior.to_tensors().items()}
    header = {"config": asdict(model.prior.config)}
    save_weights(tmp_path / "micro_sampler" / "best_weights.safetensors", tensors, header)
    return tmp_path


def test_each_run_has_its_own_choice(runs):
    def first(weights, latent_weights):
        files = runs / "micro", runs / "micro_sampler"
        model = InftyDiff.from_runs(*files, "cpu", weights=weights, latent_weights=latent_weights)
        return next(model.encoder.parameters()), model.prior.mean

    newest, best = first("newest", "newest"), first("best", "best")
    assert all(torch.equal(a / 2, b) for a, b in zip(newest, best))
    mixed = first("newest", "best")
    assert torch.equal(mixed[0], newest[0]) and torch.equal(mixed[1], best[1])


def test_encodings_are_those_of_the_weights(runs):
    encoded = {}
    for weights in ("newest", "best"):
        model = InftyDiff.from_runs(runs / "micro", device="cpu", weights=weights)
        encoded[weights] = load_or_encode(model, model.config.data, model.files["image"]).mu
    assert not torch.equal(encoded["newest"], encoded["best"])
    assert len(list((runs / "micro" / "latents").iterdir())) == 2


def test_what_is_missing_is_one_line(runs):
    (runs / "micro" / "best_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best_weights\.safetensors: no such file; accepted: the newest"):
        InftyDiff.from_runs(runs / "micro", device="cpu", weights="best")
    with pytest.raises(ValueError, match="weights is 'last'; accepted: newest, best"):
        weights_path(runs / "micro", "last")


def sampling(root: Path, *extra: str) -> list[str]:
    place = {"run.root_dir": root, "run.device": "cpu"}
    config = micro.arguments("config", {**place, "run.experiment": "micro_sampler"})
    decoder = micro.arguments("decoder_config", {"run.root_dir": root, "run.experiment": "micro"})
    return ["experiments/generate_samples.py", "--config=configs/tiny_latent_config.py", *config,
            "--decoder_config=configs/tiny_config.py", *decoder, "--seeds=0", "--sampling_steps=2",
            "--latent_sampling_steps=2", *extra]  # fmt: skip


def test_the_manifest_says_which(runs):
    done = run(sampling(runs, "--run_weights=best"))
    assert done.returncode == 0, done.stderr
    folder = runs / "micro_sampler" / "samples" / "16x12_ddim2_newest_best_latent2"
    model = json.loads((folder / "manifest.json").read_text())["model"]
    best, newest = runs / "micro_sampler" / "best_weights.safetensors", runs / "micro" / "weights.safetensors"
    assert model == {"image_run": file_digest(newest), "image_run_weights": newest.name,
                     "latent_run": file_digest(best), "latent_run_weights": best.name}  # fmt: skip
    fails(sampling(runs, f"--out_dir={folder}"), "holds results of other model")
    newest.with_name("best_weights.safetensors").unlink()
    fails(sampling(runs, "--decoder_run_weights=best"), "best_weights.safetensors: no such file")


def test_stage_two_learns_from_the_weights_it_is_told_to(runs):
    place = {**micro.LATENT, "train.steps": 2, "run.root_dir": runs, "run.device": "cpu", "run.experiment": "other"}
    decoder = micro.arguments("decoder_config", {"run.root_dir": runs, "run.experiment": "micro"})
    command = ["train_latent_diffusion.py", "--config=configs/tiny_latent_config.py", *micro.arguments("config", place),
               "--decoder_config=configs/tiny_config.py", *decoder]  # fmt: skip
    done = run([*command, "--decoder_run_weights=best"])
    assert done.returncode == 0, done.stderr
    (cache,) = (runs / "micro" / "latents").iterdir()
    assert load_weights(cache)[1]["weights"] == file_digest(runs / "micro" / "best_weights.safetensors")
    assert re.search(r"next +python experiments/generate_samples\.py .* --decoder_run_weights=best ", done.stderr)
    (runs / "micro" / "best_weights.safetensors").unlink()
    fails([*command, "--decoder_run_weights=best", "--dry_run"], "best_weights.safetensors: no such file")


def test_every_command_that_loads_a_run_has_the_flag():
    """And no command loads weights past the flag."""
    loading = re.compile(r"from_runs\(|open_model\(|encoder_of_run\(|load_or_encode\(|\bsample\(")
    found = [file for file in [*(ROOT / "experiments").glob("*.py"), *ROOT.glob("train_*.py")]
             if loading.search(file.read_text())]  # fmt: skip
    assert len(found) >= 11
    for file in found:
        defines = '_weights"', "edit.define_flags(", "define_scoring_flags(", "import compare, define_flags"
        assert any(name in file.read_text() for name in defines), file


def test_what_is_no_run_has_one_set_of_weights_and_files_too(runs, tmp_path):
    model = InftyDiff.from_runs(runs / "micro", runs / "micro_sampler", "cpu")
    file = runs / "micro" / "best_weights.safetensors"
    assert InftyDiff.from_runs(file, device="cpu").provenance(model.sampling) == {
        "image_run": file_digest(file), "image_run_weights": file.name
    }  # fmt: skip
    folder = model.save(tmp_path / "mine")
    known = InftyDiff.from_runs(folder, device="cpu").provenance(model.sampling)
    assert known == {
        "image_run": file_digest(folder / "image.safetensors"), "image_run_weights": "image.safetensors",
        "latent_run": file_digest(folder / "latent.safetensors"), "latent_run_weights": "latent.safetensors",
    }  # fmt: skip
    for given in (file, folder):
        with pytest.raises(ValueError, match=r"weights is 'best', but .* is not of a run; accepted: newest"):
            InftyDiff.from_runs(given, device="cpu", weights="best")
    with pytest.raises(ValueError, match="latent_weights is 'best'; accepted: newest, or a latent_run"):
        InftyDiff.from_runs(runs / "micro", device="cpu", latent_weights="best")
