"""The folder of a run: resolved configuration, its history, metrics, previews, and optional loggers."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from configs.schema import ImageConfig, LatentConfig
from configs.validate import one_line
from data.pixels import to_pictures
from runtime.checkpoint import checkpoint_steps
from runtime.files import cannot_write, plain, present, sweep, to_json, write_atomic, write_json
from runtime.lock import FolderLock
from runtime.loggers import LOGGERS, Logger, wanted_loggers
from runtime.sheet import Row, save_sheet
from runtime.stored import CONFIG, WEIGHTS, changes, differences, read_config, run_path

log = logging.getLogger(__name__)


class RunDir:
    """Files of one run under `<run.root_dir>/<run.experiment>/`.

    Nothing is written before `start`. Of several processes rank 0 alone calls it, and what follows it.
    `begun` says whether there is a training state to continue.

    `config.json` holds the configuration in force. `history.jsonl` says how it came about, one JSON object a line:
    {"step": 3, "changed": {"train.amp": [true, false]}} for fields with another value from that step on, old and new;
    {"step": 0, "init_from": …} for a run that began with the weights of another.

    Args:
        config: the frozen configuration.
        resume: continue what is there. Without it an existing run is refused.
    Raises:
        ValueError: when the folder holds a run whose configuration differs in a field that shapes the result, weights
            but no training state, or any run where `resume` is false; or when the package of a logger is missing.
    """

    def __init__(self, config: ImageConfig | LatentConfig, resume: bool) -> None:
        self.config = config
        self.plain_config: dict[str, Any] = plain(asdict(config))
        self.path = run_path(config)
        self.checkpoints, self.previews = self.path / "checkpoints", self.path / "images"
        self.begun = bool(checkpoint_steps(self.checkpoints))
        stored = self.path / CONFIG
        if not resume and (self.begun or present(stored)):
            raise ValueError(
                f"run.experiment is {config.run.experiment!r}, and {self.path} already holds a run; "
                "accepted: another name, or train.load_checkpoint=true to continue it"
            )
        if present(stored):
            there = read_config(stored)
            shaping = differences(there, self.plain_config)
            if shaping:
                raise ValueError(
                    f"{self.path} holds a run with another configuration ({'; '.join(shaping)}); "
                    "accepted: the same values, or another run.experiment"
                )
        if present(self.path / WEIGHTS) and not self.begun:
            raise ValueError(
                f"{self.path / WEIGHTS} would be overwritten, with no training state to continue (an imported run has "
                f"none); accepted: another run.experiment, and train.init_from={self.path} to start from its weights"
            )
        self._wanted = wanted_loggers(config.run)
        self._metrics: BinaryIO | None = None
        self._loggers: dict[str, Logger] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other trainings out of the folder; it is made, and removed at the end if nothing was written into it.

        Raises:
            ValueError: when another process trains this run; names it.
        """
        new = [folder for folder in (self.path, *self.path.parents) if not present(folder)]
        try:
            with FolderLock(self.path):
                yield
        finally:
            for folder in new:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def start(self, step: int, origin: dict[str, Any] | None = None) -> None:
        """Open the loggers, write `config.json` and open `metrics.jsonl` to go on from `step`; changed fields are told.

        Lines of metrics past `step`, and a last line half-written by a killed process, are dropped.

        Args:
            step: steps taken so far.
            origin: for the history, where the weights come from, if not from this run.
        """
        for folder in (self.path, self.checkpoints, self.previews):
            sweep(folder)
        for name in self._wanted:
            self._loggers[name] = LOGGERS[name](self.config.run, self.path, self.plain_config, step)
        stored = self.path / CONFIG  # read here, since another process may have gone on until this one had the lock
        changed = changes(read_config(stored), self.plain_config) if present(stored) else {}
        for field, (old, new) in changed.items():
            log.info("%s is %r from step %d on, %r before", field, new, step, old)
        events = [origin, {"changed": changed} if changed else None]
        history = self.path / "history.jsonl"
        told = history.read_bytes() if present(history) else b""
        told += b"".join(to_json({"step": step, **event}).encode() + b"\n" for event in events if event)
        if told:
            write_atomic(history, lambda temporary: temporary.write_bytes(told))
        write_json(self.path / CONFIG, self.plain_config)
        path = self.path / "metrics.jsonl"
        kept = []
        if present(path):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + b"\n")
        write_atomic(path, lambda temporary: temporary.write_bytes(b"".join(kept)))
        self._metrics = path.open("ab", buffering=0)

    def log(self, metrics: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`, flushed at once; what is not finite is null there.

        Raises:
            OSError: when it cannot be written, as on a full disk.
        """
        assert self._metrics is not None, "start comes first"
        try:
            self._metrics.write(to_json(metrics).encode() + b"\n")
        except OSError as error:
            raise cannot_write(self.path / "metrics.jsonl", error) from error
        self._tell(lambda logger: logger.log(metrics, int(metrics["step"])))

    def _tell(self, say: Callable[[Logger], None]) -> None:
        """Hand something to every logger; one that fails is told no more, as training must not end by it."""
        for name, logger in list(self._loggers.items()):
            try:
                say(logger)
            except Exception as error:  # of another package, of a network
                log.warning("run.logger: %s failed and gets nothing more (%s)", name, one_line(error))
                del self._loggers[name]

    def preview(self, step: int) -> Path:
        """The file of the previews of a step."""
        return self.previews / f"step_{step:08d}.png"

    def save_previews(self, step: int, rows: dict[str, torch.Tensor]) -> Path:
        """Write them, a labelled row for each kind.

        Args:
            rows: name -> (N, C, H, W) in [−1, 1].
        """
        path = self.preview(step)
        save_sheet(path, [Row(to_pictures(images), name) for name, images in rows.items()])
        self._tell(lambda logger: logger.image(path, list(rows), step))
        return path

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        self._tell(lambda logger: logger.close())
