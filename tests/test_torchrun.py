"""Several processes started from the command line: what they are told, their faults and signals."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from processes import COUNT, ROOT, environment, stage_one, together
from runtime.precision import pick_device
from runtime.processes import Processes


def test_a_fault_of_the_command_line_is_said_once(tmp_path):
    (first, said), (second, silent) = together(stage_one(tmp_path, {"model.nf": 0}))
    assert (first, second) == (2, 2)
    assert [line for line in said.splitlines() if "error" in line] == [
        "error: config.model.nf is 0; accepted: int 1 to 65536"
    ]
    assert "error" not in silent and "Traceback" not in said + silent


def test_malformed_variables_and_missing_devices_are_one_line(monkeypatch):
    for name, value in environment(1, 0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert pick_device("auto") == torch.device("cuda", 1) == taken[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="LOCAL_RANK 1, beyond the 1 CUDA devices"):
        pick_device("auto")
    assert pick_device("cpu") == torch.device("cpu")
    for changes, said in (
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
        ({"RANK": "2"}, "RANK, WORLD_SIZE, LOCAL_RANK is 2, 2"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=said):
            for name, value in changes.items():
                patch.setenv(name, value)
            Processes.from_environment()
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="WORLD_SIZE is ''"):
        Processes.from_environment()


def test_a_signal_to_torchrun_saves_one_state_that_continues(tmp_path):
    """Decoding processes get it too; the next command has another end and other rates, which do not shape the run."""
    endless = {name: 100_000 for name in ("train.steps", "train.checkpoint_steps", "train.plot_samples_steps")}
    endless |= {"data.in_memory": "never", "data.num_workers": 1}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={COUNT}"]
    log = tmp_path / "micro" / "metrics.jsonl"
    process = subprocess.Popen([*torchrun, *stage_one(tmp_path, endless)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    (state,) = (tmp_path / "micro" / "checkpoints").iterdir()
    step = int(re.fullmatch(r"step_(\d+)\.pt", state.name)[1])
    assert step > 0 and torch.load(state)["step"] == step
    assert f"stopped by signal 15 at step {step}" in errors and errors.count("stopped by") == 1
    changed = {"train.steps": step + 2, "train.amp": False, "optimizer.learning_rate": 1e-4}
    done = together(stage_one(tmp_path, {**endless, **changed}))
    assert [status for status, _ in done] == [0, 0], done
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, step + 3))
    (told,) = map(json.loads, (tmp_path / "micro" / "history.jsonl").read_text().splitlines())
    assert told["step"] == step and told["changed"].keys() == changed.keys()
