"""A day of measurements: tasks are done once, go on, fail without stopping the others; and its quick form, whole."""

import io
import json
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_day
from benchmarks.tasks import CUT, DONE, FAILED, WAITS, Day, Task

COUNTS = "open(r'{here}/runs', 'a').write('x'); print('one line'); print('the last')"


def task(name, code, **others) -> Task:
    return Task(name, f"what {name} does", ["-c", code], **others)


def states(day) -> dict[str, str]:
    return {name: day.record(one)["state"] for name, one in day.tasks.items()}


def runs(day, name) -> int:
    path = day.out / name / "runs"
    return len(path.read_text()) if path.exists() else 0


def test_what_is_done_is_not_done_again(tmp_path):
    data = tmp_path / "data"
    data.write_text("1")
    tasks = [task("first", COUNTS, reads=(data,)), task("second", COUNTS, needs=("first",)), task("other", COUNTS)]
    day = Day(tasks, tmp_path / "out", 30, 5)
    assert day.run(["second", "first"]) is False  # in the order asked for
    assert states(day) == {"first": DONE, "second": WAITS, "other": ""}
    assert day.run(["first", "second", "other"]) and day.run(["first", "second", "other"])
    assert [runs(day, name) for name in day.tasks] == [1, 1, 1]
    data.write_text("22")  # what a task reads, and what it needs, are settings of it
    assert states(day) == {"first": "", "second": "", "other": DONE}
    moved = Day([tasks[0], tasks[1], task("other", COUNTS + "; 1")], day.out, 30, 5)
    assert moved.run(list(moved.tasks))
    assert [runs(moved, name) for name in moved.tasks] == [2, 2, 2]
    text = moved.summary({"device": "this one"})
    assert "this one" in text and text.count("the last") == 3 and "one line" not in text
    assert "one line" in (day.out / "summary.txt").read_text()
    rows = json.loads((day.out / "summary.json").read_text())["tasks"]
    assert [row["state"] for row in rows] == [DONE] * 3 and all(row["seconds"] > 0 for row in rows)


def test_a_task_that_fails_is_recorded_and_the_next_goes_on(tmp_path):
    code = "import sys; print('error: no such thing', file=sys.stderr); sys.exit(2)"
    day = Day([task("bad", code), task("on_it", COUNTS, needs=("bad",)), task("good", COUNTS)], tmp_path, 30, 5)
    assert day.run(list(day.tasks)) is False
    assert states(day) == {"bad": FAILED, "on_it": WAITS, "good": DONE}
    assert day.record(day.tasks["bad"])["said"] == "status 2: error: no such thing"
    assert day.record(day.tasks["on_it"])["said"] == "for bad" and runs(day, "on_it") == 0


def test_a_task_that_is_cut_goes_on(tmp_path):
    """It is asked to stop, saves, and the next call starts it anew; one that cannot go on has failed."""
    saves = (
        "import pathlib, signal, sys, time\n"
        "place = pathlib.Path(r'{here}/saved')\n"
        "def save(*_): place.write_text('x'); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "if place.exists(): print('continued'); sys.exit()\n"
        "print('begun', file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    tasks = [task("long", saves, continues=True), task("short", saves), task("deaf", deaf)]
    day, begun = Day(tasks, tmp_path, 1.5, 0.5), time.monotonic()
    assert day.run(list(day.tasks)) is False
    assert time.monotonic() - begun < 20
    assert states(day) == {"long": CUT, "short": FAILED, "deaf": FAILED}
    assert day.record(tasks[0])["said"] == "begun" and "longer than 2 s" in day.record(tasks[1])["said"]
    spent = day.record(tasks[0])["seconds"]
    assert day.run(["long"]) and day.record(tasks[0])["said"] == "continued"
    assert day.record(tasks[0])["seconds"] > spent  # of both calls


def test_pictures_are_put_together(tmp_path):
    code = "[open(r'{here}/%d.png' % i, 'w').write(str(i)) for i in range(3)]"
    assert Day([task("draw", code, pictures=("draw/*.png",))], tmp_path, 30, 5).run(["draw"])
    assert (tmp_path / "pictures" / "draw_2.png").read_text() == "2"
    assert len(list((tmp_path / "pictures").iterdir())) == 1


@pytest.fixture
def command(monkeypatch):
    """Calls the command in this process; its tasks are processes of their own. Returns its status."""

    def call(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_day.py", *arguments])
        with pytest.raises(SystemExit) as left:
            gpu_day.main()
        return left.value.code

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return call


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A zip of 24 small images."""
    path = tmp_path_factory.mktemp("archive") / "images.zip"
    numbers = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as images:
        for i in range(24):
            file = io.BytesIO()
            Image.fromarray(numbers.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(file, "PNG")
            images.writestr(f"{i:02d}.png", file.getvalue())
    return path


QUICK = ("--device=cpu", "--quick", "--config=configs/tiny_config.py", "--latent_config=configs/tiny_latent_config.py")


def test_the_quick_day(tmp_path, archive, command, capsys):
    """Every command of the day in earnest, on tiny networks, but for the tests, which run anyway."""
    out = tmp_path / "day"
    tasks = "operators,train_step_tiny,sampling,train,train_latent,reconstructions,samples,scores,resolutions"
    arguments = (f"--out_dir={out}", f"--archive={archive}", *QUICK, f"--task={tasks}")
    assert command(*arguments) == 0, (out / "summary.txt").read_text()
    rows = json.loads((out / "summary.json").read_text())["tasks"]
    assert [row["task"] for row in rows if row["state"] == DONE and row["said"]] == tasks.split(",")
    assert [row["task"] for row in rows if row["state"] != DONE] == ["tests"]
    for name in ("operators/operators", "train_step_tiny/train_step", "sampling/sampling", "scores/scores"):
        assert json.loads((out / f"{name}.json").read_text())
    assert len(list((out / "samples" / "images").glob("[0-9]*.png"))) == 4
    shown = {path.name.partition("_")[0] for path in (out / "pictures").iterdir()}
    assert shown == {"train", "reconstructions", "resolutions"}
    assert (out / "summary.txt").read_text().count("\n== ") == 9
    capsys.readouterr()
    assert command(*arguments, "--list") == 0 and capsys.readouterr().out.count(DONE) == 9
    assert command(*arguments) == 0 and capsys.readouterr().out.count("done before") == 9


def test_the_tests_of_a_day_are_there():
    found = gpu_day.gpu_tests()
    assert {"tests/test_gpu_step.py", "tests/test_diffusion_cuda.py", "tests/test_sparse_conv_triton.py"} <= set(found)
    assert "tests/test_gpu_day.py" not in found and all((gpu_day.ROOT / name).is_file() for name in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=cpu"], "with --quick"),
        ([*QUICK, "--task=operators,fly"], "'fly' is no task; accepted: tests, operators"),
        ([*QUICK, "--archive=nowhere.zip"], "nothing there"),
        ([*QUICK, "--minutes=1"], "accepted: more than 1"),
        ([*QUICK, "--train_steps=1"], "whole numbers from 2"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, command, capsys, arguments, message):
    assert command(f"--out_dir={tmp_path / 'out'}", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()
