"""Tasks of a long measurement: commands with a time limit, each done once, which the next call goes on from.

A task leaves in its folder what it printed (table.txt), what it reported (log.txt), and state.json.
The last names a digest of the command, the files it reads and the tasks it needs: with other settings it runs again.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from configs.effects import training_only
from data.opening import read_json
from runtime.files import to_json, write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
DONE, CUT, FAILED, WAITS = "done", "to be continued", "failed", "waits"


def as_settings(fields: dict) -> list[str]:
    """FIELD=VALUE of each."""
    return [f"{field}={value}" for field, value in fields.items()]


def overrides(flag: str, settings: Iterable[str], trains: bool) -> list[str]:
    """FIELD=VALUE as overrides of a configuration flag; those of the training are for the command that trains it."""
    return [f"--{flag}.{text}" for text in settings if trains or not training_only(text.partition("=")[0])]


@dataclass(frozen=True)
class Task:
    """One command.

    name: of the task and its folder. what: it measures, in a few words. command: arguments of Python; "{out}" in them
    is the folder of all tasks, "{here}" that of this one. needs: tasks that must be done before. reads: files from
    elsewhere. continues: whether the command, cut short by SIGTERM, goes on when it is run again. pictures: patterns
    below the folder of all tasks, of what is copied to pictures/ when the task is done.
    """

    name: str
    what: str
    command: Sequence[str]
    needs: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    continues: bool = False
    pictures: tuple[str, ...] = field(default=())


class Day:
    """Tasks run one after the other; what they leave is in one folder.

    out: the folder. seconds: of a task, within which it is asked to stop (SIGTERM) so that it can save for `grace`
    seconds before it is ended.
    """

    def __init__(self, tasks: Sequence[Task], out: Path, seconds: float, grace: float) -> None:
        self.tasks, self.out = {task.name: task for task in tasks}, out
        self.seconds, self.grace = seconds, grace

    def digest(self, task: Task) -> str:
        """What the result of a task depends on beside the code; where the folder is, is no part of it."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in task.reads]
        needed = [self.digest(self.tasks[name]) for name in task.needs]
        return hashlib.sha256(to_json([list(task.command), files, needed]).encode()).hexdigest()[:16]

    def record(self, task: Task) -> dict[str, Any]:
        """What is known of a task with these settings: at least its state, "" if it never ran."""
        path = self.out / task.name / "state.json"
        known = read_json(path, dict, "the state of a task") if path.exists() else {}
        return known if known.get("digest") == self.digest(task) else {"state": ""}

    def run(self, names: Sequence[str]) -> bool:
        """Run what is not done of these tasks; a task that fails is recorded and the next goes on.

        Returns whether all are done.
        """
        for name in names:
            task = self.tasks[name]
            if self.record(task)["state"] == DONE:
                print(f"{name}: done before", flush=True)
                continue
            missing = [other for other in task.needs if self.record(self.tasks[other])["state"] != DONE]
            if missing:
                self._note(task, WAITS, 0.0, f"for {', '.join(missing)}")
            else:
                print(f"{name}: {task.what}", flush=True)
                self._note(task, *self._execute(task))
            print(f"{name}: {self.record(task)['state']}", flush=True)
        return all(self.record(self.tasks[name])["state"] == DONE for name in names)

    def _execute(self, task: Task) -> tuple[str, float, str]:
        """State, seconds and last line of the command."""
        here = self.out / task.name
        here.mkdir(parents=True, exist_ok=True)
        command = [part.replace("{out}", str(self.out)).replace("{here}", str(here)) for part in task.command]
        offline = {"HF_HUB_OFFLINE": "1"}  # no network is asked for anything
        begun = time.monotonic()
        with (here / "table.txt").open("w") as table, (here / "log.txt").open("a") as log:
            status, in_time, _ = execute(command, table, log, offline, ROOT, self.seconds, self.grace)
        seconds = time.monotonic() - begun
        if in_time and status == 0:
            self._keep_pictures(task)
            return DONE, seconds, last_line(here / "table.txt") or last_line(here / "log.txt")
        if not in_time and task.continues:
            return CUT, seconds, last_line(here / "log.txt")
        reason = f"status {status}" if in_time else f"took longer than {self.seconds:.0f} s"
        return FAILED, seconds, f"{reason}: {last_line(here / 'log.txt')}"

    def _keep_pictures(self, task: Task) -> None:
        for pattern in task.pictures:
            for path in sorted(self.out.glob(pattern))[-1:]:  # of training pictures the newest
                to = self.out / "pictures" / f"{task.name}_{path.name}"
                to.parent.mkdir(exist_ok=True)
                write_atomic(to, lambda temporary, path=path: shutil.copy(path, temporary))

    def _note(self, task: Task, state: str, seconds: float, said: str) -> None:
        before = self.record(task).get("seconds", 0.0)
        content = {"state": state, "digest": self.digest(task), "seconds": round(before + seconds, 2), "said": said}
        write_json(self.out / task.name / "state.json", {**content, "command": list(task.command)})

    def summary(self, circumstances: dict[str, Any]) -> str:
        """Write summary.json and summary.txt, the states and tables of all tasks; return the states as text."""
        rows = [{"task": name, "what": task.what, **self.record(task)} for name, task in self.tasks.items()]
        lines = [", ".join(f"{name} {value}" for name, value in circumstances.items()), ""]
        lines += [
            f"{row['task']:<22}{row['state'] or 'not run':<17}{row.get('seconds', 0):>8.0f} s  {row.get('said', '')}"
            for row in rows
        ]
        tables = [
            f"\n== {name}: {task.what}\n{(self.out / name / 'table.txt').read_text()}"
            for name, task in self.tasks.items()
            if self.record(task)["state"] == DONE
        ]
        write_json(self.out / "summary.json", {**circumstances, "tasks": rows})
        write_atomic(self.out / "summary.txt", lambda path: path.write_text("\n".join([*lines, *tables]) + "\n"))
        return "\n".join(lines)


def execute(
    command: Sequence[str],
    stdout: IO[str],
    stderr: IO[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    seconds: float | None = None,
    grace: float | None = None,
) -> tuple[int, bool, float]:
    """Run a command of Python in a session of its own.

    Args:
        command: arguments of Python.
        stdout, stderr: files for what it prints.
        environment: variables beside those of this process.
        folder: where it runs, by default here.
        seconds, grace: when it is asked to stop (SIGTERM, also by Ctrl-C), and how much later ended; None for never.
    Returns:
        Its status, whether it ended by itself, and its processor time in seconds.
    """
    before = _children_cpu()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=stdout, stderr=stderr, start_new_session=True,
    )  # fmt: skip
    try:
        status, in_time = _wait(process, seconds, grace)
    except KeyboardInterrupt:  # it saves before it leaves
        _wait(process, 0, grace)
        raise
    return status, in_time, _children_cpu() - before


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _wait(process: subprocess.Popen, seconds: float | None, grace: float | None) -> tuple[int, bool]:
    try:
        return process.wait(seconds), True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(grace), False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(), False


def last_line(path: Path) -> str:
    """The last line that is not empty, cut short; progress bars count as lines."""
    lines = [line.strip() for line in path.read_text(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""
