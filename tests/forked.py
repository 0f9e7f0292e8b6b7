"""Commands as users type them, in processes of their own that need not import PyTorch again.

One process a session imports what commands import, computes nothing, and forks for each command: what runs is the
script, with its own arguments, environment and standard streams, as `python SCRIPT …` from the repository root.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PRELOADED = ("configs.defaults", "runtime.command", "training.prepare", "training.trainer", "infty_diff.encodings",
              "training.image_stage", "training.latent_stage", "torchvision.utils")  # fmt: skip


def run(command: list, environment: dict[str, str] | None = None, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a script of the repository, given as for `python`; texts and status as of `subprocess.run`."""
    command = [str(part) for part in command]
    with tempfile.TemporaryDirectory() as folder:
        files = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        request = {"command": command, "environment": environment or dict(os.environ), "timeout": timeout, **files}
        server = _server()
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = json.loads(server.stdout.readline())
        texts = {name: Path(file).read_text() for name, file in files.items()}
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, texts["stdout"], texts["stderr"])
    return subprocess.CompletedProcess(command, status, **texts)


@lru_cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.stdin.close)
    return server


def _serve() -> None:
    import importlib

    sys.path[0] = str(ROOT)
    for name in _PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)
        print(json.dumps(_wait(child, request["timeout"])), flush=True)


def _wait(child: int, timeout: float) -> int | None:
    import signal
    import time

    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.005)


def _become(request: dict) -> None:
    """Be the script, in this forked process."""
    import runpy
    import traceback

    for number, (name, flags) in enumerate((("/dev/null", os.O_RDONLY), (request["stdout"], os.O_WRONLY | os.O_CREAT),
                                            (request["stderr"], os.O_WRONLY | os.O_CREAT))):  # fmt: skip
        os.dup2(os.open(name, flags), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    script = request["command"][0]
    sys.argv, sys.path[0] = list(request["command"]), str((ROOT / script).parent)
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
