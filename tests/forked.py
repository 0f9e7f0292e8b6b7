"""Commands as users type them, in processes of their own that need not import PyTorch again.

One process a session imports what commands import, computes nothing, and forks for each command: what runs is the
script, with its own arguments, environment and standard streams, as `python SCRIPT …` from the repository root.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PRELOADED = ("configs.defaults", "runtime.command", "training.prepare", "training.trainer", "infty_diff.encodings",
              "training.image_stage", "training.latent_stage", "torchvision.utils", "infty_diff.reference_runs",
              "experiments.support.commands", "experiments.support.comparing", "experiments.support.editing",
              "metrics.nearest", "torch.utils.data")  # fmt: skip
_CAP_DAC_OVERRIDE = 1  # by which root may write anywhere


@dataclass
class Started:
    """A command that runs: signals may be sent to `pid` until it is waited for."""

    command: list[str]
    pid: int

    def wait(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Texts and status as of `subprocess.run`; subprocess.TimeoutExpired, and a kill, where it does not end."""
        status, stdout, stderr = _ask({"wait": self.pid, "timeout": timeout})
        if status is None:
            raise subprocess.TimeoutExpired(self.command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(self.command, status, stdout, stderr)


def start(
    command: Sequence, environment: dict[str, str] | None = None, largest: int | None = None, user: bool = False
) -> Started:
    """Start a script of the repository, or another one by its whole path, given as for `python`.

    largest: bytes beyond which no file can grow, what a full disk is to those that write. user: without root's right
    to write where permissions forbid it.
    """
    command = [str(part) for part in command]
    request = {"command": command, "environment": environment or dict(os.environ), "largest": largest, "user": user}
    return Started(command, _ask(request))


def run(
    command: Sequence, environment: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess:
    """As `start`, and wait for its end."""
    return start(command, environment).wait(timeout)


def _ask(request: dict):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


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
    streams: dict[int, list[int]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(_wait(request["wait"], streams.pop(request["wait"]), request["timeout"])), flush=True)
            continue
        (stdout, out), (stderr, err) = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            _become(request, out, err)
        os.close(out)
        os.close(err)
        streams[child] = [stdout, stderr]
        print(child, flush=True)


def _wait(child: int, streams: list[int], timeout: float) -> tuple[int | None, str, str]:
    import signal
    import time

    texts = {stream: b"" for stream in streams}

    def read() -> None:
        for stream in streams:
            with contextlib.suppress(BlockingIOError):  # while it has nothing; processes of the child may keep it open
                while chunk := os.read(stream, 1 << 16):
                    texts[stream] += chunk

    for stream in streams:
        os.set_blocking(stream, False)
    deadline, ended, status = time.monotonic() + timeout, 0, None
    while not ended:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        ended, ending = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(ending) if ended else None
        read()
        if not ended:
            time.sleep(0.005)
    for stream in streams:
        os.close(stream)
    return status, *(text.decode(errors="replace") for text in texts.values())


def _become(request: dict, out: int, err: int) -> None:
    """Be the script, in this forked process."""
    import runpy
    import traceback

    for number, stream in enumerate((os.open("/dev/null", os.O_RDONLY), out, err)):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    script = request["command"][0]
    sys.argv, sys.path[0] = list(request["command"]), str((ROOT / script).parent)
    status = 0
    try:
        _confine(request)
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


def _confine(request: dict) -> None:
    import ctypes
    import resource
    import signal

    if request["largest"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"],) * 2)
    if request["user"] and os.geteuid() == 0:
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # of capset(2), version 3
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.capget(header, sets):
            raise OSError(ctypes.get_errno(), "capget")
        for kind in range(3):  # effective, permitted, inheritable
            sets[kind] &= ~(1 << _CAP_DAC_OVERRIDE)
        if libc.capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    _serve()
