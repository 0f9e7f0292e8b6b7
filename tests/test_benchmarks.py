"""The benchmark of a training step: its clock, its command, and that it measures the step that trains."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.part_clock import BACKWARD, OUTSIDE, Part, PartClock
from benchmarks.train_step import PARTS, StepTimer, instrumented, point_counts
from configs.flags import apply_overrides, load_config
from configs.schema import ImageConfig
from configs.validate import freeze
from training.precision import Precision

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "data.img_size": "12", "data.img_width": "10", "train.batch_size": "2", "train.ema_update_every": "2",
    "model.nf": "4", "model.num_conv_blocks": "1", "model.kernel_size": "3", "model.uno_res": "4",
    "model.uno_base_channels": "4", "model.uno_mults": "(1,2)", "model.uno_blocks_per_level": "(1,1)",
    "model.uno_attn_resolutions": "(2,)", "model.z_dim": "8", "model.time_emb_dim": "8",
}  # fmt: skip
FORWARD_ONLY = {"coordinates", "mollifier", "gradient clipping", "optimiser", "averaged weights", OUTSIDE.name}


def small_config() -> ImageConfig:
    config = load_config(str(ROOT / "configs" / "tiny_config.py"))
    assert not apply_overrides(config, list(SMALL.items()))
    return freeze(config, ImageConfig)


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/train_step.py", "--config=configs/tiny_config.py", *arguments]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


class Slow(torch.autograd.Function):
    """The identity, which sleeps 20 ms on the way there and 40 ms on the way back."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.02)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.04)
        return gradient


def test_clock_gives_sleep_to_the_part_that_sleeps():
    clock = PartClock(torch.device("cpu"))
    inner = clock.timed_both_ways("{} inner", Slow.apply)
    outer = clock.timed_both_ways("{} outer", lambda x: 2 * Slow.apply(inner(3 * x)))
    network = clock.within("net", outer)
    x = torch.ones(3, requires_grad=True)
    clock.begin()
    (network(x) + Slow.apply(x)).sum().backward()
    spent = clock.end()
    assert torch.equal(x.grad, torch.full((3,), 7.0))
    expected = {"net inner": (20, 40), "net outer": (20, 40), OUTSIDE.name: (60, 0)}
    assert set(spent) == {Part(name, d) for name in expected for d in ("forward", BACKWARD)} - {
        Part(OUTSIDE.name, BACKWARD)
    }
    for part, milliseconds in spent.items():  # a sleep charged to a wrong part is missing from the right one
        assert milliseconds >= expected[part.name][part.direction == BACKWARD]


def test_clock_refuses_parts_that_do_not_nest():
    clock = PartClock(torch.device("cpu"))
    clock.begin()
    clock.enter(Part("a"))
    with pytest.raises(RuntimeError, match="'a'"):
        clock.end()
    with pytest.raises(RuntimeError, match="'b'"):
        clock.leave(Part("b"))


def test_instruments_change_nothing():
    """A step under the clock gives the weights of a plain step to the last bit, and leaves the trainer as it was."""
    config, precision = small_config(), Precision(torch.device("cpu"), None)
    plain, timed = StepTimer(config, precision), StepTimer(config, precision)
    for number in range(2):
        plain.step(number, 40, by_part=False)
        timed.step(number, 40, by_part=True)
    for name, module in plain.trainer.stage.modules.items():
        other = timed.trainer.stage.modules[name]
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters()))
    patched = (torch.Tensor.backward, torch.nn.utils.clip_grad_norm_)
    with instrumented(timed.trainer, timed.clock):
        assert torch.Tensor.backward is not patched[0]
    assert (torch.Tensor.backward, torch.nn.utils.clip_grad_norm_) == patched
    assert all("forward" not in vars(module) for module in timed.trainer.stage.modules["denoiser"].modules())


def test_updates_of_the_averages_count_by_their_frequency():
    timer = StepTimer(small_config(), Precision(torch.device("cpu"), None))  # an update every second step
    assert timer.per_step([1.0, 5.0, 1.0, 7.0, 3.0]) == 0.5 * 1.0 + 0.5 * 6.0


def test_check_names_a_parameter_without_gradient():
    timer = StepTimer(small_config(), Precision(torch.device("cpu"), None))
    timer.step(0, 40, by_part=False)
    timer.check()
    timer.trainer.stage.modules["encoder"].linear_in.bias.grad = None
    with pytest.raises(FloatingPointError, match=r"encoder\.linear_in\.bias"):
        timer.check()


def test_command_times_every_part(tmp_path):
    path = tmp_path / "result.json"
    done = run_command("--ratios=1,0.25", "--repeats=2", "--warmup=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["size"] == [12, 10] and result["config"]["model"]["nf"] == 4
    assert {"date", "commit", "device", "torch", "threads", "precision", "batch_size"} <= set(result)
    assert [row["points"] for row in result["rows"]] == [30, 120]
    for row in result["rows"]:
        assert tuple(part["part"] for part in row["parts"]) == PARTS
        assert row["images_per_second"] == pytest.approx(2 / (row["step_ms"] / 1e3))
        assert row["peak_memory_bytes"] > 0
        assert sum(part["share"] for part in row["parts"]) == pytest.approx(1)
        for part in row["parts"]:
            assert part["part"] in done.stdout
            drawn = part["part"] != "coordinates" or row["points"] < 120  # the whole lattice needs no drawing
            assert part["ms"] > part["backward_ms"] >= 0 or not drawn
            one_way = part["part"] in FORWARD_ONLY or part["part"].endswith((" plan", " k-NN"))
            assert (part["backward_ms"] > 0) != one_way


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
    command = [sys.executable, "benchmarks/operators.py", "--device=cpu", "--sizes=8,16", "--ratios=1,0.25"]
    command += ["--channels=16", "--batch=2", "--repeats=2", f"--json={path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_operators_are_compared_with_what_they_replace(operators):
    result, printed = operators
    rows = result["rows"]
    fields = {"op", "size", "ratio", "backend", "ms", "baseline", "baseline_ms", "speedup", "max_error"}
    assert all(fields <= row.keys() for row in rows)
    of = {op: [row for row in rows if row["op"] == op] for op in ("conv", "block", "knn", "mollifier", "coordinates")}
    assert {op: len(some) for op, some in of.items()} == {
        "conv": 4, "block": 8, "knn": 4, "mollifier": 2, "coordinates": 2,
    }  # fmt: skip
    assert {row["baseline"].split(":")[0] for row in of["block"]} == {"dense masked", "as published"}
    assert {row["backend"] for row in of["conv"]} == {"native"}
    for row in rows:
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["ms"])
        assert 0 <= row["max_error"] < 1e-4
        assert row["op"] in printed
    assert {(row["op"], row["ratio"]) for row in result["scaling"]} >= {("conv", 1), ("conv", 0.25), ("block", 0.25)}
    for row in result["scaling"]:
        assert row["sizes"] == [8, 16] and row["growth"] == pytest.approx(row["ms"][1] / row["ms"][0])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--ratios=0,1", "accepted: numbers above 0 and up to 1"),
        ("--sizes=2", "accepted: sides from 6"),
        ("--ops=conv,fft", "fft: accepted: conv, block"),
        ("--json=nowhere/rows.json", "a file in a folder that exists"),
        ("--backend=cuda", "invalid choice"),
    ],
)
def test_operators_refuse_what_they_cannot_measure(argument, message):
    command = [sys.executable, "benchmarks/operators.py", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_wrong_results_are_not_timed(monkeypatch):
    from benchmarks import operators
    from models.operators.native import NativeBackend

    conv = NativeBackend.conv
    monkeypatch.setattr(NativeBackend, "conv", lambda *given, **named: 1.001 * conv(*given, **named))
    setting = operators.Setting(torch.device("cpu"), torch.float32, 2, 16, "native", 1)
    for op in ("conv", "block"):
        with pytest.raises(ArithmeticError, match="times of wrong results mean nothing"):
            list(operators.measure(setting, op, 8, 0.5))


@pytest.mark.parametrize("guided", [False, True])
def test_sampling_compares_back_ends_at_every_size(tmp_path, guided):
    path = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/sampling.py", "--config=configs/tiny_config.py", "--sizes=12x10,36x30"]
    command += [f"--config.{name}={value}" for name, value in SMALL.items()] + ["--repeats=2", f"--json={path}"]
    command += ["--guided"] if guided else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["size"], row["backend"], row["baseline"]) for row in rows] == [
        ([12, 10], "native", "torch_dense"), ([36, 30], "native", "torch_dense"),
    ]  # fmt: skip
    assert all(0 <= row["max_error"] < 1e-4 and row["speedup"] > 0 for row in rows)
    assert "36x30" in done.stdout and ("guided evaluation" in done.stdout) == guided
