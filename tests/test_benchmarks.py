"""The benchmarks: their commands, and that they measure what trains and samples."""

import json
import subprocess

import pytest
import torch

from benchmarks.live_tensors import LiveTensors
from benchmarks.published import PublishedStep
from benchmarks.train_step import PARTS, StepTimer, point_counts
from configs.schema import ImageConfig
from configs.validate import freeze
from forked import ROOT, run
from runtime.overrides import apply_overrides, load_config
from runtime.precision import Precision

SMALL = {
    "data.img_size": "12", "data.img_width": "10", "train.batch_size": "2", "train.ema_update_every": "2",
    "model.nf": "4", "model.num_conv_blocks": "1", "model.kernel_size": "3", "model.uno_res": "4",
    "model.uno_base_channels": "4", "model.uno_mults": "(1,2)", "model.uno_blocks_per_level": "(1,1)",
    "model.uno_attn_resolutions": "(2,)", "model.z_dim": "8", "model.time_emb_dim": "8",
}  # fmt: skip


def small_config() -> ImageConfig:
    config = load_config(str(ROOT / "configs" / "tiny_config.py"))
    assert not apply_overrides(config, list(SMALL.items()))
    return freeze(config, ImageConfig)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = ["benchmarks/train_step.py", "--config=configs/tiny_config.py", *arguments]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()]
    return run(command)


def test_updates_of_the_averages_count_by_their_frequency():
    timer = StepTimer(small_config(), Precision(torch.device("cpu"), None))  # an update every second step
    assert timer.per_step([1.0, 5.0, 1.0, 7.0, 3.0]) == 0.5 * 1.0 + 0.5 * 6.0


def test_check_names_a_parameter_without_gradient():
    timer = StepTimer(small_config(), Precision(torch.device("cpu"), None))
    timer.step(0, 40)
    timer.check()
    timer.trainer.stage.modules["encoder"].linear_in.bias.grad = None
    with pytest.raises(FloatingPointError, match=r"encoder\.linear_in\.bias"):
        timer.check()


def test_command_times_a_step_beside_the_published_one(tmp_path):
    path = tmp_path / "result.json"
    done = run_command("--ratios=1,0.25", "--repeats=2", "--warmup=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["size"] == [12, 10] and result["config"]["model"]["nf"] == 4
    fields = {"date", "commit", "device", "instructions", "torch", "threads", "precision", "batch_size"}
    assert fields <= set(result)
    assert [row["points"] for row in result["rows"]] == [30, 120]
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(2 / (row["step_ms"] / 1e3))
        assert row["speedup"] == pytest.approx(row["published_ms"] / row["step_ms"])
        assert row["gflop_per_second"] == pytest.approx(1e3 * row["gflop"] / row["step_ms"])
        assert row["peak_memory_bytes"] > 0 and row["product_gflop_per_second"] > 0
        assert {"convolutions", "linear layers"} <= set(row["parts"]) <= {*PARTS, "other"}
        assert all(part in done.stdout for part in row["parts"])
    assert 0 < result["rows"][0]["tensor_bytes"] < result["rows"][1]["tensor_bytes"]
    assert done.stdout.count("times as long") == 2


def test_tensors_count_while_they_live():
    w = torch.nn.Parameter(torch.randn(1000))
    with LiveTensors() as live:
        x = torch.zeros(1000)
        y = x + 1
        del x
        assert (live.now, live.peak) == (4000, 8000)
        z = y.view(10, 100) * w.view(10, 100)
        del y  # the product keeps it for the gradient of w
        loss = z.exp().sum()
        del z  # whose exponential is kept, not z
        assert (live.now, live.peak) == (8004, 12_004)
        loss.backward()
        assert live.now == 4004  # the gradient and the loss


def test_the_published_step_trains():
    """Its loss falls on one batch, and the networks it copied stay as they are."""
    timer = StepTimer(small_config(), Precision(torch.device("cpu"), None))
    before = {name: p.clone() for name, p in timer.trainer.stage.modules["denoiser"].named_parameters()}
    step = PublishedStep(timer.trainer.stage, 60)
    losses = [step(timer.batch(0), number) for number in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(torch.equal(before[n], p) for n, p in timer.trainer.stage.modules["denoiser"].named_parameters())


@pytest.mark.parametrize("ratios", ["", "1,", "half", "0", "-0.5", "1.5", "nan", "0.01", "0.5,0.5"])
def test_bad_ratios_are_refused(ratios):
    with pytest.raises(ValueError, match="--ratios="):
        point_counts(small_config(), ratios)


def test_ratios_become_points():
    config = small_config()
    assert point_counts(config, "1,0.5,0.1") == [12, 60, 120]
    assert point_counts(config, None) == [config.mc_integral.q_sample] == [30]


def test_bad_input_leaves_with_status_2():
    done = run_command("--ratios=0.5,2", "--json=/no/such/folder/x.json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --ratios=0.5,2: '2' is not accepted") and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """The rows of a small run of benchmarks/operators.py, and what it printed."""
    path = tmp_path_factory.mktemp("operators") / "rows.json"
    command = ["benchmarks/operators.py", "--device=cpu", "--sizes=8,16", "--ratios=1,0.25"]
    command += ["--channels=16", "--batch=2", "--repeats=2", f"--json={path}"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_operators_are_compared_with_what_they_replace(operators):
    result, printed = operators
    rows = result["rows"]
    fields = {"op", "size", "ratio", "backend", "ms", "baseline", "baseline_ms", "speedup", "max_error"}
    assert all(fields <= row.keys() for row in rows)
    of = {op: [row for row in rows if row["op"] == op] for op in ("conv", "block", "knn", "mollifier", "coordinates")}
    assert {op: len(some) for op, some in of.items()} == {
        "conv": 4, "block": 12, "knn": 4, "mollifier": 2, "coordinates": 2,
    }  # fmt: skip
    assert {row["baseline"].split(":")[0] for row in of["block"]} == {"dense masked", "as published", "torch_dense"}
    assert printed.count("slower") == sum(row["speedup"] < 1 / 1.1 for row in rows)
    assert {row["backend"] for row in of["conv"]} == {"native"}
    for row in rows:
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ms"])
        assert 0 <= row["max_error"] < 1e-4
        assert row["op"] in printed
    assert {(row["op"], row["ratio"]) for row in result["scaling"]} >= {("conv", 1), ("conv", 0.25), ("block", 0.25)}
    for row in result["scaling"]:
        assert row["sizes"] == [8, 16] and row["growth"] == pytest.approx(row["ms"][1] / row["ms"][0])


def test_engines_are_timed_beside_the_one_that_is_chosen():
    from benchmarks import operators

    setting = operators.Setting(torch.device("cpu"), torch.float32, 2, 16, "native", 1)
    for op, ratio in (("engines", 0.5), ("engines_forward", 1)):
        rows = list(operators.measure(setting, op, 8, ratio))
        assert {"dense", "pairs"} <= {row["baseline"].partition(":")[0] for row in rows}
        assert all(row["ms"] > 0 and row["baseline_ms"] > 0 and row["max_error"] < 1e-5 for row in rows)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--ratios=0,1", "accepted: numbers above 0 and up to 1"),
        ("--sizes=2", "accepted: sides from 6"),
        ("--ops=conv,fft", "fft; accepted: conv, block"),
        ("--json=nowhere/rows.json", "a file in a folder that exists"),
        ("--backend=cuda", "invalid choice"),
    ],
)
def test_operators_refuse_what_they_cannot_measure(argument, message):
    command = ["benchmarks/operators.py", argument]
    done = run(command)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_wrong_results_are_not_timed(monkeypatch):
    from benchmarks import operators
    from models.operators.sparse_conv.native import NativeBackend

    conv = NativeBackend.conv
    monkeypatch.setattr(NativeBackend, "conv", lambda *given, **named: 1.001 * conv(*given, **named))
    setting = operators.Setting(torch.device("cpu"), torch.float32, 2, 16, "native", 1)
    for op in ("conv", "block"):
        with pytest.raises(ArithmeticError, match="times of wrong results mean nothing"):
            list(operators.measure(setting, op, 8, 0.5))


@pytest.mark.parametrize("guided", [False, True])
def test_sampling_compares_back_ends_at_every_size(tmp_path, guided):
    path = tmp_path / "rows.json"
    command = ["benchmarks/sampling.py", "--config=configs/tiny_config.py", "--sizes=12x10,36x30"]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()] + ["--repeats=2", f"--json={path}"]
    command += ["--guided"] if guided else []
    done = run(command)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["size"], row["backend"], row["baseline"]) for row in rows] == [
        ([12, 10], "native", "torch_dense"), ([36, 30], "native", "torch_dense"),
    ]  # fmt: skip
    assert all(0 <= row["max_error"] < 1e-4 and row["speedup"] > 0 for row in rows)
    assert "36x30" in done.stdout and ("guided evaluation" in done.stdout) == guided


def test_sampling_is_measured_alone(tmp_path):
    path = tmp_path / "rows.json"
    command = ["benchmarks/sampling.py", "--config=configs/tiny_config.py", "--sizes=12x10"]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()]
    command += ["--repeats=1", "--baseline=", f"--json={path}"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert "baseline_ms" not in row and row["ms"] > 0 and "12x10" in done.stdout
