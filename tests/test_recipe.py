"""The comparison of recipes: every candidate is a valid configuration; what is run, once; what is written."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import recipe
from configs.schema import ImageConfig, LatentConfig
from configs.validate import freeze
from runtime.overrides import apply_overrides, load_config
from runtime.stored import WEIGHTS
from runtime.weights import save_weights

ROOT = Path(__file__).resolve().parents[1]
FID = {"rate_5e-4": 30.0, "v": 20.0, "tiny": 40.0, "tiny_filter": 35.0}
SCORES = {"metric": "FD", "floor": 10.0, "kid": 0.0025, "kid_standard_error": None, "precision": 0.5, "recall": 0.25,
          "num_samples": 500, "num_reference": 2500, "warnings": []}  # fmt: skip


def frozen(file, changes, stage):
    config = load_config(str(ROOT / f"configs/{file}_config.py"))
    assert not apply_overrides(config, [tuple(change.split("=", 1)) for change in changes])
    return freeze(config, stage)


@pytest.mark.parametrize("name", recipe.CANDIDATES)
def test_candidates_are_valid_and_differ(name):
    candidate = recipe.CANDIDATES[name]
    image = frozen("landscapes_32", candidate.image, ImageConfig)
    frozen("landscapes_32_latent", candidate.latent, LatentConfig)
    if candidate.of:
        assert candidate.sampling and not candidate.image and not recipe.CANDIDATES[candidate.of].of
    elif name != "config":
        assert image != frozen("landscapes_32", (), ImageConfig)


def test_tiny_is_the_tiny_model():
    ours = frozen("landscapes_32", recipe.CANDIDATES["tiny"].image, ImageConfig)
    assert ours.model == frozen("tiny", (), ImageConfig).model


class Commands:
    """Stands for the project's commands: notes them, and leaves what they would."""

    def __init__(self, out):
        self.out, self.calls = out, []

    def __call__(self, name, script, *arguments):
        flags = dict(argument[2:].split("=", 1) for argument in arguments if "=" in argument)
        self.calls.append((name, Path(script).stem))
        here = self.out / name
        if script.startswith("train"):
            folder = Path(flags["config.run.root_dir"]) / flags["config.run.experiment"]
            save_weights(folder / WEIGHTS, {"a": torch.zeros(3, 4)}, {})
            if folder.parent == self.out / "runs":
                self.steps = int(flags["config.train.steps"])
            return 2.0 + 0.5 * int(flags["config.train.steps"])  # half a second a step
        if script.endswith("fid.py"):
            (here / "scores.json").write_text(json.dumps({"fid": FID[name], **SCORES}))
        if script.endswith("recons.py"):
            (here / "recons").mkdir(parents=True)
            (here / "recons" / "result.json").write_text(json.dumps({"mean": {"random_psnr": 17.25}}))
        return 9.0


def run(out, only, monkeypatch, *options, status=0):
    commands = Commands(out)
    monkeypatch.setattr(recipe.Recipes, "call", lambda self, *arguments: commands(*arguments))
    with pytest.raises(SystemExit) as left:
        recipe.main([f"--out_dir={out}", f"--only={only}", "--budget_s=60", "--latent_steps=70", *options])
    assert left.value.code == status
    return commands.calls


def test_each_is_done_once_and_the_best_is_first(tmp_path, monkeypatch, capsys):
    training = ["train_inf_ae_diffusion"] * 3 + ["train_latent_diffusion"]
    measuring = ["generate_samples", "generate_recons", "calculate_fid"]
    calls = run(tmp_path, "rate_5e-4,v", monkeypatch)
    assert calls == [(name, script) for name in ("rate_5e-4", "v") for script in training + measuring]
    assert run(tmp_path, "v,rate_5e-4", monkeypatch) == []
    # Models of another are trained once, whoever asks first.
    calls = run(tmp_path, "tiny_filter,tiny", monkeypatch)
    expected = [("tiny", script) for script in training] + [("tiny_filter", script) for script in measuring]
    assert calls == expected + [("tiny", script) for script in measuring]
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["results"]) == ["v", "rate_5e-4", "tiny_filter", "tiny"]
    row = content["results"]["v"]
    assert (row["step_cpu_s"], row["steps"], row["image_cpu_s"], row["latent_cpu_s"]) == (0.5, 120, 62.0, 37.0)
    assert (row["image_parameters"], row["latent_parameters"]) == (12, 12)
    assert (row["fid"], row["floor"], row["recon_psnr"], row["sampling_cpu_s"]) == (20.0, 10.0, 17.25, 9.0)
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["v", "rate_5e-4", "tiny_filter", "tiny"]
    assert lines[-4].split()[:6] == ["v", "500", "120", "0.00", "20.0", "2.5"]
    assert lines[-4] in capsys.readouterr().out


def test_seeds_share_their_steps_and_the_table_has_their_spread(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FID, "v_seed1", 24.0)
    calls = run(tmp_path, "v", monkeypatch, "--seeds=2")
    assert [name for name, _ in calls] == ["v"] * 7 + ["v_seed1"] * 5  # the time of a step is measured once
    assert json.loads((tmp_path / "results.json").read_text())["results"]["v_seed1"]["steps"] == 120
    assert "22.0 ± 2.8" in capsys.readouterr().out
    assert run(tmp_path, "v", monkeypatch) == []  # a result of more seeds is one of fewer
    steps = run(tmp_path / "steps", "v,rate_5*", monkeypatch, "--steps=33")
    assert {name for name, _ in steps} == {"v", "rate_5e-4"}
    assert json.loads((tmp_path / "steps/results.json").read_text())["results"]["v"]["steps"] == 33


def test_what_failed_is_told_and_tried_again(tmp_path, monkeypatch):
    def fail(self, name, script, *arguments):
        if name == "v":
            raise recipe.CommandFailed("train: status 2: no such field")
        return Commands.__call__(commands, name, script, *arguments)

    commands = Commands(tmp_path)
    monkeypatch.setattr(recipe.Recipes, "call", fail)
    with pytest.raises(SystemExit) as left:
        recipe.main([f"--out_dir={tmp_path}", "--only=v,rate_5e-4", "--budget_s=60", "--latent_steps=70"])
    assert left.value.code == "failed: v"
    assert list(recipe.read_results(tmp_path)) == ["rate_5e-4"]
    assert {name for name, _ in run(tmp_path, "v", monkeypatch)} == {"v"}


def test_a_command_is_timed_by_the_processor_and_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "ROOT", tmp_path)
    (tmp_path / "work.py").write_text(
        "import os, sys, time\ntime.sleep(0.5)\nend = time.process_time() + 0.3\n"
        "while time.process_time() < end: pass\nprint(os.environ['OMP_NUM_THREADS'])\nsys.exit(int(sys.argv[1]))\n"
    )
    _, options = recipe._parse([f"--out_dir={tmp_path}", "--threads=3"])
    recipes = recipe.Recipes(options)
    assert 0.3 <= recipes.call("one", "work.py", "0") < 0.75  # not the half second asleep
    with pytest.raises(recipe.CommandFailed, match=r"work\.py: status 4: 3 \(see .*log\.txt\)"):
        recipes.call("one", "work.py", "4")
    assert (tmp_path / "one" / "log.txt").read_text().count("$ python work.py") == 2


def test_other_settings_and_wrong_ones_are_refused(tmp_path, monkeypatch, capsys):
    run(tmp_path, "v", monkeypatch)
    run(tmp_path, "v", monkeypatch, "--set=train.batch_size=8", status=2)
    assert "holds results of other settings" in capsys.readouterr().err
    for wrong in ("--only=w", "--num_samples=1", "--latent_steps=0", "--threads=0", "--budget_s=0",
                  "--steps=0", "--device=cuda"):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            recipe.main([f"--out_dir={tmp_path}", wrong])
        assert left.value.code == 2 and "accepted: " in capsys.readouterr().err
