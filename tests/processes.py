"""Starting several processes for tests, as torchrun does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import micro

ROOT = Path(__file__).parents[1]
COUNT = 2


def environment(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def stage_one(root: Path, changes: dict | None = None) -> list[str]:
    fields = micro.overrides(root, micro.IMAGE, {"run.experiment": "micro", **(changes or {})})
    return ["train_inf_ae_diffusion.py", "--config", "configs/ffhq_256_config.py", *micro.arguments("config", fields)]


def together(command: list[str]) -> list[tuple[int, str]]:
    """Status and errors of each process of a command."""
    port = free_port()
    started = [
        subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                         env={**os.environ, **environment(rank, port)}) for rank in range(COUNT)
    ]  # fmt: skip
    return [(process.wait(timeout=120), process.stderr.read()) for process in started]
