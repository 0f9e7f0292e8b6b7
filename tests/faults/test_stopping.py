"""However training is stopped, by whatever it meets, its state is saved first, or the one before is as it was."""

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from data.loader import batches
from runtime.checkpoint import checkpoint_path, checkpoint_steps, load_checkpoint, save_checkpoint
from runtime.files import sweep, write_atomic, write_json
from runtime.lock import FolderLock
from runtime.signals import Signals
from runtime.weights import save_weights
from test_training import image_trainer, metrics

ENDING = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
ENDLESS = {name: 10_000 for name in ("train.steps", "train.checkpoint_steps", "train.plot_samples_steps")}


@pytest.fixture
def default_handlers():
    """Those of a program that a terminal starts; nohup and shell scripts leave some signals ignored."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ENDING)
def test_every_signal_that_ends_a_session_saves(tmp_path, number, default_handlers):
    trainer = image_trainer(tmp_path, ENDLESS)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    assert stop.value.code == 128 + number and checkpoint_steps(trainer.run_dir.checkpoints) == [trainer.step]
    assert trainer.step > 0 and signal.getsignal(number) == default_handlers[number]


def test_nohup_is_honoured():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.number == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Slow(torch.utils.data.Dataset):
    """Images whose readers can be killed."""

    pixels = None

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        time.sleep(0.02)
        return torch.full((3, 4, 4), i % 256, dtype=torch.uint8)


def test_a_dead_reader_is_met_at_the_next_batch_and_not_before():
    before = set(multiprocessing.active_children())
    reading = batches(Slow(), 4, seed=0, num_workers=1)
    next(reading)
    (reader,) = set(multiprocessing.active_children()) - before
    reader.kill()
    time.sleep(0.2)  # a handler of SIGCHLD would raise here
    with pytest.raises(ChildProcessError, match=r"reads images died.*data\.num_workers"):
        while True:
            next(reading)


@pytest.mark.parametrize("fault", [ChildProcessError("a process that reads images died"), ValueError("x.png is broken"),
                                   OSError(5, "Input/output error", "x.png")])  # fmt: skip
def test_data_that_cannot_be_read_stop_training_after_a_save(tmp_path, capsys, fault):
    trainer = image_trainer(tmp_path, ENDLESS)
    whole = trainer.stage.batches

    def broken(seen):
        for i, batch in enumerate(whole(seen)):
            if i == 3:
                raise fault
            yield batch

    trainer.stage.batches = broken
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    assert stop.value.code == 2 and checkpoint_steps(trainer.run_dir.checkpoints) == [3]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(fault) in line and "training has reached step 3; its state is saved" in line
    after = image_trainer(tmp_path, {"train.steps": 5})
    after.run()
    assert [line["step"] for line in metrics(after)] == [1, 2, 3, 4, 5]


def test_data_that_cannot_be_read_at_first_save_nothing(tmp_path, capsys):
    trainer = image_trainer(tmp_path, ENDLESS)

    def broken(seen):
        yield from ()
        raise ValueError("x.png is broken")

    trainer.stage.batches = broken
    with pytest.raises(SystemExit):
        trainer.run()
    assert "error: x.png is broken\n" in capsys.readouterr().err
    assert not checkpoint_steps(trainer.run_dir.checkpoints)


def test_a_held_out_image_that_cannot_be_read_stops_after_a_save(tmp_path, capsys):
    trainer = image_trainer(tmp_path, ENDLESS)

    def broken(ema):
        raise ValueError("held out: x.png is broken")

    trainer.stage.held_out_loss = broken
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    assert stop.value.code == 2 and checkpoint_steps(trainer.run_dir.checkpoints) == [2]
    assert "held out: x.png is broken" in capsys.readouterr().err and [m["step"] for m in metrics(trainer)] == [1, 2]


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError(28, "No space left on device"),
                                   ValueError("x"), torch.OutOfMemoryError("x"), ZeroDivisionError()])  # fmt: skip
def test_previews_that_fail_are_told_after_the_save_and_end_nothing(tmp_path, caplog, error):
    trainer = image_trainer(tmp_path, {"train.steps": 3, "train.plot_samples_steps": 1, "train.checkpoint_steps": 1})
    there = []

    def fail(ema):
        there.append(checkpoint_steps(trainer.run_dir.checkpoints)[0])
        raise error

    trainer.stage.previews = fail
    trainer.run()
    assert there == [1, 2, 3] and trainer.step == 3
    assert caplog.text.count(f"failed ({type(error).__name__}: ") == 3


def test_a_logger_that_fails_ends_nothing(tmp_path, caplog):
    class Failing:
        told = 0

        def log(self, metrics, step):
            Failing.told += 1
            raise ConnectionError("no network")

    trainer = image_trainer(tmp_path, {"train.steps": 3})
    start = trainer.run_dir.start

    def started(*given):
        start(*given)
        trainer.run_dir._loggers["wandb"] = Failing()

    trainer.run_dir.start = started
    trainer.run()
    assert trainer.step == 3 and Failing.told == 1
    assert "run.logger: wandb failed and gets nothing more (no network)" in caplog.text


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_temporary_files_of_dead_processes_are_swept(tmp_path):
    host = socket.gethostname()
    ours, dead = f".a.pt.{host}.{os.getpid()}.tmp", f".a.pt.{host}.{dead_process()}.tmp"
    elsewhere, forgotten, former = ".a.pt.another.1.tmp", ".b.pt.another.1.tmp", ".weights.safetensors.77.tmp"
    other = "step_00000001.pt"
    for name in (ours, dead, elsewhere, forgotten, former, other):
        (tmp_path / name).touch()
    for name in (forgotten, former, ours):
        os.utime(tmp_path / name, (time.time() - 2 * 86400,) * 2)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {ours, elsewhere, other}


def test_training_sweeps_its_folder(tmp_path):
    trainer = image_trainer(tmp_path, {"train.steps": 1})
    left = [folder / f".x.{socket.gethostname()}.{dead_process()}.tmp"
            for folder in (trainer.run_dir.path, trainer.run_dir.checkpoints, trainer.run_dir.previews)]  # fmt: skip
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    trainer.run()
    assert not any(path.exists() for path in left)


@pytest.fixture
def small_files():
    """A function after which no file may be longer than some bytes: what a full disk is to those that write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_last_files_as_they_were(tmp_path, small_files):
    state, tensors = {"step": 1, "a": torch.ones(50_000)}, {"a": torch.ones(50_000)}
    writes = {
        checkpoint_path(tmp_path, 1): lambda: save_checkpoint(tmp_path, 1, state, keep=1),
        tmp_path / "weights.safetensors": lambda: save_weights(tmp_path / "weights.safetensors", tensors, {}),
        tmp_path / "config.json": lambda: write_json(tmp_path / "config.json", list(range(50_000))),
        tmp_path / "raw": lambda: write_atomic(tmp_path / "raw", lambda path: path.write_bytes(bytes(200_000))),
    }
    for write in writes.values():
        write()
    before = {path: path.read_bytes() for path in writes}
    for size in (0, 1000, 4096, 100_000):
        for path, write in writes.items():
            small_files(size)
            try:
                with pytest.raises(OSError, match=rf"{path.name}: cannot be written \(.+\)") as error:
                    write()
            finally:
                small_files(resource.RLIM_INFINITY)
            assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_training_on_a_full_disk_is_one_line_and_its_last_state_loads(tmp_path, small_files):
    trainer = image_trainer(tmp_path, {"train.steps": 4, "train.checkpoint_steps": 2})
    batch = trainer.stage.batches

    def filling(seen):
        for i, images in enumerate(batch(seen)):
            if i == 3:
                small_files(20_000)
            yield images

    trainer.stage.batches = filling
    with pytest.raises(OSError, match=r"step_00000004\.pt: cannot be written"):
        trainer.run()
    small_files(resource.RLIM_INFINITY)
    assert load_checkpoint(trainer.run_dir.checkpoints, 2)["step"] == 2
    image_trainer(tmp_path, {"train.steps": 4}).run()


def test_a_second_training_of_a_run_is_refused_and_the_first_goes_on(tmp_path):
    trainer = image_trainer(tmp_path, {"train.steps": 2})
    inside, outside = os.pipe()
    child = os.fork()
    if not child:
        with FolderLock(trainer.run_dir.path):
            os.write(outside, b"x")
            signal.pause()
    os.read(inside, 1)
    with pytest.raises(ValueError, match=f"micro: in use by process {child} on "):
        trainer.run()
    assert [path.name for path in trainer.run_dir.path.iterdir()] == [".lock"]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    trainer.run()
    assert trainer.step == 2 and not (trainer.run_dir.path / ".lock").exists()
