"""Saved models: what `InftyDiff.save` writes and weights/ holds, read again from Python and by commands."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import infty_diff
from data.pixels import to_uint8
from forked import run
from infty_diff import InftyDiff, SamplingOptions, stage_files
from runtime import saved
from runtime.saved import saved_files
from runtime.stored import read_header
from runtime.weights import save_weights
from test_api import FAST, one_line, states
from test_commands import fails
from test_generation import build, stored

SHIPPED = "--saved_model=landscapes-32"
STORED = SamplingOptions("4", "dpmpp", inv_snr=0.2, clip=False)
# Command and its own flags; super_resolution and inpaint open models as generate_recons does.
COMMANDS = {
    "generate_recons": ["--num_images=1", "--nostochastic_codes"],
    "interpolate": ["--frames=2", "--seeds=3,7"],
    "generate_samples": ["--num_samples=2"],
    "calculate_fid": ["--model=random_features"],
    "nearest_neighbours": ["--metric=pixels", "--shortlist=5"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    model = build(root / "runs")
    model.sampling = STORED
    return model.save(root / "saved")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the runs micro and micro_sampler."""
    root = tmp_path_factory.mktemp("runs")
    stored(root)
    return root


@pytest.fixture(scope="module")
def model(runs) -> InftyDiff:
    return InftyDiff.from_runs(runs / "micro", runs / "micro_sampler", "cpu")


def assert_equal(a: InftyDiff, b: InftyDiff) -> None:
    first, second = states(a), states(b)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_runs_files_folders_and_names(runs, model, tmp_path, monkeypatch):
    files = [runs / run / "weights.safetensors" for run in ("micro", "micro_sampler")]
    assert_equal(InftyDiff.from_runs(*files, device="cpu"), model)
    assert InftyDiff.from_runs(files[0], device="cpu").prior is None
    chosen = SamplingOptions(25, "dpmpp", inv_snr=0.1)
    model.sampling, before = chosen, model.sampling
    try:
        model.save(tmp_path / "weights" / "mine")
    finally:
        model.sampling = before
    monkeypatch.setattr(saved, "FOLDER", tmp_path / "weights")
    for given in (tmp_path / "weights" / "mine", str(tmp_path / "weights" / "mine"), "mine"):
        again = InftyDiff.from_runs(given, device="cpu")
        assert_equal(again, model)
        assert again.sampling == chosen and again.trained == model.trained == {"image": 1, "latent": 1}
        assert again.process.prediction == model.process.prediction
    assert torch.equal(again.sample([5], 16, FAST, latent_steps=4), model.sample([5], 16, FAST, latent_steps=4))
    assert_equal(InftyDiff.from_runs("mine", runs / "micro_sampler", "cpu"), model)
    with pytest.raises(ValueError) as error:
        InftyDiff.from_runs("landscape", device="cpu")
    assert "(mine)" in one_line(error)
    with pytest.raises(ValueError) as error:
        InftyDiff.from_runs(runs / "micro_sampler", device="cpu")
    assert "weights of LatentConfig; accepted: weights of ImageConfig" in one_line(error)
    with pytest.raises(ValueError) as error:
        InftyDiff.from_runs(runs / "micro", runs / "micro", device="cpu")
    assert "weights of ImageConfig; accepted: weights of LatentConfig" in one_line(error)
    (tmp_path / "other.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        InftyDiff.from_runs(tmp_path / "other.safetensors", device="cpu")


def test_half_precision_halves_the_files_and_rounds_once(model, tmp_path):
    full, half = model.save(tmp_path / "full"), model.save(tmp_path / "half", half=True)
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in (full, half)]
    assert sizes[1] < 0.7 * sizes[0]  # headers and float64 statistics stay
    again, exact = states(InftyDiff.from_runs(half, device="cpu")), states(model)
    for name, tensor in exact.items():
        bound = torch.finfo(torch.float16).eps / 2 * tensor.abs() + 2.0**-25  # of a number and of a subnormal one
        assert again[name].dtype == tensor.dtype and ((again[name] - tensor).abs() <= bound).all(), name
    InftyDiff.from_runs(half, device="cpu").save(tmp_path / "again", half=True)
    for name in (saved.IMAGE, saved.LATENT):
        assert (half / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_saved_models_tell_nothing_of_the_machine(runs, model, tmp_path):
    header = read_header(model.save(tmp_path / "saved") / saved.IMAGE)
    assert str(runs) in json.dumps(asdict(model.config)) and str(runs) not in json.dumps(header)
    assert header["version"] == infty_diff.__version__ and header["step"] == 1


def test_saving_is_all_or_nothing(model, tmp_path, monkeypatch):
    model.save(tmp_path / "there")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    with pytest.raises(ValueError) as error:
        model.save(tmp_path / "there", half=True)
    assert "holds something already" in one_line(error)

    def fail_at_the_second(path, *rest):
        if path.name == saved.LATENT:
            raise OSError("no space left")
        save_weights(path, *rest)

    monkeypatch.setattr(stage_files, "save_weights", fail_at_the_second)
    with pytest.raises(OSError, match="no space left"):
        model.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()} == kept


@pytest.mark.skipif(not saved.shipped_names(), reason="the folder weights/ holds no model")
def test_shipped_models_load_and_are_small():
    for name in saved.shipped_names():
        model, folder = InftyDiff.from_runs(name, device="cpu"), saved.FOLDER / name
        assert model.prior is not None and model.trained
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 10e6
        assert str(Path.home()) not in json.dumps(read_header(folder / saved.IMAGE))


def test_commands_take_a_saved_model_and_its_options(folder):
    out, compared = folder.parent / "out", ("calculate_fid", "nearest_neighbours")
    for name, own in COMMANDS.items():
        place = [f"--samples={out}/saved/samples/16x12_dpmpplogsnr4_snr0.2", f"--cache_dir={out}", "--device=cpu"]
        if name not in compared:
            image = "decoder_config" if name == "interpolate" else "config"  # in whose folder results are
            place = [f"--{image}.run.root_dir={out}", "--config.run.device=cpu"]
        done = run([f"experiments/{name}.py", f"--saved_model={folder}", *place, *own])
        assert done.returncode == 0, done.stderr
        if name in compared:
            assert str(out) in done.stdout
            continue
        kind = name.replace("generate_samples", "samples")
        (settings,) = (path for path in (out / "saved" / kind).glob("*/*.json") if path.stem != "result")
        assert json.loads(settings.read_text())["settings"]["sampling"] == asdict(STORED)


@pytest.mark.skipif(not (Path(__file__).parents[1] / "weights/landscapes-32").is_dir(), reason="weights are not there")
def test_a_fresh_clone_samples_by_name_with_the_options_of_the_model(tmp_path):
    where = [f"--config.run.root_dir={tmp_path}", "--config.run.device=cpu"]
    done = run(["experiments/generate_samples.py", SHIPPED, *where, "--seeds=5", "--sample_img_size=8x12",
                "--latent_sampling_steps=3"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = tmp_path / "landscapes-32/samples/8x12_ddim25_latent3"
    model = InftyDiff.from_runs("landscapes-32", device="cpu")
    expected = to_uint8(model.sample([5], (8, 12), latent_steps=3))[0].permute(1, 2, 0)
    np.testing.assert_array_equal(np.array(Image.open(out / "000005.png")), expected)
    done = run(["experiments/super_resolution.py", SHIPPED, where[0], where[1], "--input", out / "000005.png",
                "--input_size=8x12", "--factor=2", "--sampler=dpmpp"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    (report,) = (tmp_path / "landscapes-32/super_resolution").glob("*/result.json")
    assert json.loads(report.read_text())["sampling"]["steps"] == SamplingOptions(sampler="dpmpp").steps


def test_contradictions_are_refused(folder, tmp_path):
    alone = InftyDiff.from_runs(saved_files(str(folder)).image, device="cpu").save(tmp_path / "alone")
    (tmp_path / "other").mkdir()
    for script, flags, part in (
        ("inpaint", ["--config=configs/tiny_config.py"], "--saved_model, --config; accepted: one of them"),
        ("inpaint", ["--config.model.nf=7"], f"--config.model.nf is 7, but {folder} was trained with 8"),
        ("generate_samples", ["--decoder_run_weights=best"], "is not of a run; accepted: newest"),
        ("calculate_fid", ["--samples=x", "--reference=y"], "--reference, --config, --saved_model; accepted: exactly"),
        ("generate_samples", ["--saved_model=nope"], "nope is no saved model; accepted: a folder that InftyDiff.save"),
        ("generate_samples", [f"--saved_model={tmp_path / 'other'}"], "is no saved model"),
        ("interpolate", [f"--saved_model={alone}", "--seeds=3,7"], f"{alone} holds no latent model"),
        ("condition", ["--sensors=none.csv", "--latents=prior"], "none.csv"),
        ("condition", ["--sensors=none.csv", "--seeds=3"], "none.csv"),
        ("calibrate_filter", ["--num_images=1"], "reconstructions have nothing in common with the images"),  # untrained
    ):
        fails([f"experiments/{script}.py", f"--saved_model={folder}", *flags], part)
