"""Commands on models that are named instead of configured: those in weights/, and what `InftyDiff.save` wrote."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pixels import to_uint8
from forked import run
from infty_diff import InftyDiff, SamplingOptions
from runtime.saved import saved_files
from test_commands import fails
from test_generation import build

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
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    model = build(root / "runs")
    model.sampling = STORED
    return model.save(root / "saved")


def test_commands_take_a_saved_model_and_its_options(saved):
    out, compared = saved.parent / "out", ("calculate_fid", "nearest_neighbours")
    for name, own in COMMANDS.items():
        place = [f"--samples={out}/saved/samples/16x12_dpmpplogsnr4_snr0.2", f"--cache_dir={out}", "--device=cpu"]
        if name not in compared:
            image = "decoder_config" if name == "interpolate" else "config"  # in whose folder results are
            place = [f"--{image}.run.root_dir={out}", "--config.run.device=cpu"]
        done = run([f"experiments/{name}.py", f"--saved_model={saved}", *place, *own])
        assert done.returncode == 0, done.stderr
        if name in compared:
            assert str(out) in done.stdout
            continue
        folder = name.replace("generate_samples", "samples")
        (settings,) = (path for path in (out / "saved" / folder).glob("*/*.json") if path.stem != "result")
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


def test_contradictions_are_refused(saved, tmp_path):
    alone = InftyDiff.from_runs(saved_files(str(saved)).image, device="cpu").save(tmp_path / "alone")
    (tmp_path / "other").mkdir()
    for script, flags, part in (
        ("inpaint", ["--config=configs/tiny_config.py"], "--saved_model, --config; accepted: one of them"),
        ("inpaint", ["--config.model.nf=7"], f"--config.model.nf is 7, but {saved} was trained with 8"),
        ("generate_samples", ["--decoder_run_weights=best"], "is not of a run; accepted: newest"),
        ("calculate_fid", ["--samples=x", "--reference=y"], "--reference, --config, --saved_model; accepted: exactly"),
        ("generate_samples", ["--saved_model=nope"], "nope is no saved model; accepted: a folder that InftyDiff.save"),
        ("generate_samples", [f"--saved_model={tmp_path / 'other'}"], "is no saved model"),
        ("interpolate", [f"--saved_model={alone}", "--seeds=3,7"], f"{alone} holds no latent model"),
        ("calibrate_filter", ["--num_images=1"], "reconstructions have nothing in common with the images"),  # untrained
    ):
        fails([f"experiments/{script}.py", f"--saved_model={saved}", *flags], part)
