"""Table 3 and Figures 2 and 7: reading logs, tables, pictures, plots, and the two commands on a micro model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import forked
import micro
from experiments.support import commands
from experiments.support.plots import bar_plots, line_plot, require_matplotlib
from experiments.support.run_log import log_lines, median_speed, training_memory
from experiments.support.sparsity import RatioResult, parse_ratios, rows, table
from pictures import folder
from runtime.files import write_json

ROOT = Path(__file__).parents[1]


def test_ratios_are_read():
    assert parse_ratios("1, 1/2,0.25") == [Fraction(1), Fraction(1, 2), Fraction(1, 4)]
    for text in ("", "1/0", "0", "2", "half", "1/2,0.5", "-1/2"):
        with pytest.raises(ValueError, match="--ratios is "):
            parse_ratios(text)


def test_the_table_compares_with_its_first_row():
    report = {"fid": 3.15, "floor": None, "kid": 0.00421, "precision": 0.7, "recall": 0.5, "num_samples": 9}
    results = [RatioResult(Fraction(1), 1024, 50.0, 8.0, report), RatioResult(Fraction(1, 8), 128, 80.0, 5.25, None)]
    assert [row["speedup"] for row in rows(results)] == [1.0, 1.6]
    json.dumps(rows(results))
    header, first, second = table(results, "FID_CLIP").splitlines()
    assert header.split() == ["Ratio", "Points", "FID_CLIP", "Floor", "KID×1000", "Precision", "Recall", "Images/s",
                              "Speed-up", "Memory"]  # fmt: skip
    assert first.split() == ["1", "1024", "3.15", "-", "4.21", "0.70", "0.50", "50.0", "1.00x", "8.00", "GB"]
    assert second.split() == ["1/8", "128", *"-----", "80.0", "1.60x", "5.25", "GB"]
    assert len(header) == len(first) == len(second)


def test_the_log_of_a_run(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds no log line"):
        log_lines(tmp_path)
    speeds, memory = [1.0, 30.0, 10.0, 20.0], [4.0, 4.5, 9.0, 9.0]
    lines = [
        {"step": 10 * (i + 1), "images_per_second": speed, "peak_memory_gb": gb}
        for i, (speed, gb) in enumerate(zip(speeds, memory))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert log_lines(tmp_path) == lines
    assert median_speed(lines) == 20.0  # not of the first line
    assert median_speed(lines[:1]) == 1.0
    assert training_memory(lines, pictures_every=30) == 4.5  # not of the pictures
    assert training_memory(lines, pictures_every=5) == 4.0
    assert training_memory([{"step": 1, "images_per_second": 1.0}], 5) is None


def test_plots_are_pictures(tmp_path):
    line_plot(tmp_path / "lines.png", {"16x16": {5: 2.0, 10: 1.0}, "32x32": {5: 3.0, 10: 2.5}}, "Steps", "FID", "Size")
    bar_plots(tmp_path / "bars.png", ["1", "1/2"], {"FID": [3.0, None], "Memory": [2.0, 1.0]}, "part")
    for name in ("lines.png", "bars.png"):
        pixels = np.array(Image.open(tmp_path / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_without_matplotlib_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        require_matplotlib()


def test_a_score_is_computed_once(tmp_path, monkeypatch):
    samples, report, calls = tmp_path / "samples", tmp_path / "fid.json", []
    samples.mkdir()
    Image.new("RGB", (4, 4)).save(samples / "000000.png")
    wanted = SimpleNamespace(num_samples=2, model="random_features", weights=None, split="train")

    def fake(script: str, *arguments: str) -> None:
        calls.append([script, *arguments])
        content = {"fid": 7.0, "num_samples": wanted.num_samples, "extractor": {"name": wanted.model}}
        Path(arguments[-1].removeprefix("--json=")).write_text(json.dumps(content))

    monkeypatch.setattr(commands, "run", fake)
    monkeypatch.setattr(commands, "FLAGS", wanted)
    for _ in range(2):
        assert commands.score(samples, report, ["--config=c.py"])["fid"] == 7.0
    assert calls == [["experiments/calculate_fid.py", f"--samples={samples}", "--config=c.py",
                      "--split=train", "--model=random_features", "--num_samples=2", f"--json={report}"]]  # fmt: skip
    later = report.stat().st_mtime_ns + 10**9
    os.utime(samples / "000000.png", ns=(later, later))  # a sample drawn again
    commands.score(samples, report, [])
    assert len(calls) == 2
    os.utime(report, ns=(later + 1, later + 1))
    wanted.num_samples, wanted.weights = 3, "w.pt"
    commands.score(samples, report, [])
    assert "--weights=w.pt" in calls[2]
    wanted.split = "val"  # another reference, another report
    commands.score(samples, report, [])
    os.utime(tmp_path / "fid_val.json", ns=(later + 1, later + 1))
    commands.score(samples, report, [])
    assert len(calls) == 4 and "--split=val" in calls[3]


def test_a_command_that_fails_ends_the_experiment(capfd):
    with pytest.raises(SystemExit) as left:
        commands.run("experiments/generate_samples.py", "--nonsense")
    assert left.value.code == 2
    assert "nonsense" in capfd.readouterr().err


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Run an experiment from the repository root, with its caches out of the user's home."""
    environment = {**os.environ, "HOME": str(tmp_path_factory.mktemp("home"))}

    def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
        return forked.run([f"experiments/{script}", *arguments], environment, timeout=300)

    return run


def configs(root: Path, names: tuple[str, str], experiments: tuple[str, str] = ("", "")) -> list[str]:
    """The arguments of both stages of the micro model under the given flag names: image, latent."""
    files = ("configs/tiny_config.py", "configs/tiny_latent_config.py")
    fields = (micro.IMAGE, micro.LATENT)
    given = []
    for name, file, values, experiment in zip(names, files, fields, experiments):
        places = {"run.root_dir": root, "run.experiment": experiment} if experiment else {}
        given += [f"--{name}={file}", *micro.arguments(name, {**values, "run.device": "cpu", **places})]
    return given


SCORING = ("--num_samples=3", "--latent_sampling_steps=2", "--model=random_features")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, command) -> tuple[Path, subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("sweep") / "table"
    pictures = folder(out.parent / "pictures", 24)
    # A run of the name and place that the configuration has: not the one that is scored.
    write_json(out.parent / "tiny" / "config.json", asdict(micro.image(out.parent)))
    data = {"run.root_dir": out.parent, "data.name": "folder", "data.root_dir": pictures}
    done = command("coordinate_sparsity.py", *configs(out, ("decoder_config", "config")), *SCORING,
                   *micro.arguments("decoder_config", data), "--ratios=1/2", "--sampling_steps=2",
                   f"--out_dir={out}")  # fmt: skip
    return out, done


def test_table_3_in_one_command(sweep):
    out, done = sweep
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "coordinate_sparsity.json").read_text())
    (row,) = result["rows"]
    assert (row["ratio"], row["points"], row["speedup"]) == ("1/2", 96, 1.0)
    assert row["fid"] > 0 and row["floor"] > 0 and row["images_per_second"] > 0 and 0.1 < row["memory_gb"] < 100
    assert (out / "coordinate_sparsity.txt").read_text().strip() in done.stdout
    assert Image.open(out / "coordinate_sparsity.png").width > 300
    scored = json.loads((out / "ratio_1-2_fid.json").read_text())
    assert scored["reference"]["path"].startswith("data.name=folder") and scored["reference"]["size"] == [16, 12]
    trained = json.loads((out / "ratio_1-2" / "config.json").read_text())
    assert trained["mc_integral"]["q_sample"] == 96
    assert len(list((out / "ratio_1-2_samples").glob("0*.png"))) == 3


@pytest.mark.parametrize(
    ("figure", "extra", "picture"),
    [
        ("2", ["--seeds=0-1", "--sampling_steps=2"], "resolutions.png"),
        ("7", ["--steps=2", *SCORING, "--reference_at_size", "--split=all", "--enlarged"], "steps_and_resolutions.png"),
    ],
)
def test_figures_2_and_7_in_one_command(sweep, command, tmp_path, figure, extra, picture):
    places = []  # the files say other sizes, networks and data than the runs have
    for name, file, run in (("decoder_config", "tiny", "ratio_1-2"), ("config", "tiny_latent", "ratio_1-2_sampler")):
        where = {"run.root_dir": sweep[0], "run.experiment": run, "run.device": "cpu"}
        places += [f"--{name}=configs/{file}_config.py", *micro.arguments(name, where)]
    where = ("--sizes=20x10", f"--out_dir={tmp_path}")
    done = command("resolution_sweep.py", *places, f"--figure={figure}", *extra, *where)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / picture).with_suffix(".json").read_text())
    assert (report["sizes"], report["train_size"]) == (["20x10"], "16x12")
    if figure == "7":
        assert report["fid"]["20x10"]["2"] > 0 and report["floor"]["20x10"]["2"] > 0
        assert report["kid"]["20x10"].keys() == {"2"}
        scored = json.loads((tmp_path / "20x10_ddim2_scored_fid_at_size_all.json").read_text())["reference"]
        assert scored["path"].startswith("data.name=folder") and scored["path"].endswith("split all")
        assert scored["size"] == [20, 10]
        assert report["fid"].keys() == {"20x10", "20x10 enlarged"}
        small, large = (Image.open(tmp_path / f"{name}/000000.png") for name in
                        ("16x12_ddim2_scored", "20x10_ddim2_scored_enlarged"))  # fmt: skip
        assert np.array_equal(np.asarray(small.resize((10, 20), Image.Resampling.LANCZOS)), np.asarray(large))
    assert Image.open(tmp_path / picture).width > 150


def test_wrong_input_is_one_line(tmp_path, command):
    places = ["--config=configs/tiny_config.py", f"--out_dir={tmp_path}"]
    for script, arguments, part in (
        ("coordinate_sparsity.py", places, "--decoder_config is missing"),
        ("coordinate_sparsity.py", ["--config=configs/tiny_latent_config.py", "--decoder_config=configs/tiny_config.py",
                                    f"--out_dir={tmp_path}", "--weights=none.pt"], "none.pt: no such file"),
        ("coordinate_sparsity.py", [*places, "--skip_fid", "--config.mc_integral.ratio=0.5"], "--ratios says it"),
        ("resolution_sweep.py", ["--config=configs/tiny_latent_config.py", "--decoder_config=configs/tiny_config.py",
                                 f"--decoder_config.run.root_dir={tmp_path}"], "no such file"),
    ):  # fmt: skip
        done = command(script, *arguments)
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr, done.stderr
