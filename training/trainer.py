"""The training loop of both stages, in one process or in several that train together.

Everything random in step k follows from (run.seed, k), so a resumed run draws what the uninterrupted one would have
drawn, and a state needs no random-number state beside its step.

A step whose gradient is not finite changes neither weights nor moments, and a state that is not finite is not written.
After a row of such steps weights may be of no use though finite: until it ends, nothing good is overwritten by them.
"""

import contextlib
import itertools
import logging
import math
import platform
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from configs.schema import ImageConfig, LatentConfig
from configs.validate import one_line
from runtime.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    drop_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
)
from runtime.precision import Precision, describe
from runtime.processes import ALONE, Processes, leave
from runtime.run_dir import RunDir
from runtime.signals import Signals
from runtime.stored import BEST_WEIGHTS, WEIGHTS, numbered_weights
from runtime.weights import save_weights, stored_step
from training.acceleration import accelerate
from training.ema import Ema, PowerAverages
from training.guard import StepGuard
from training.init_from import take_over
from training.means import Means
from training.parallel import DividedBatch
from training.rates import rate_factor
from training.report import Clock, announce, conclude
from training.snapshots import FOLDER, drop_snapshots, save_snapshot
from training.stage import Stage
from training.state import check_state, restore, state_of

log = logging.getLogger(__name__)


class Trainer:
    """Optimiser, EMA, checkpoints and reports around a `Stage`.

    Args:
        config: configuration of the stage.
        stage: networks, data and loss.
        run_dir: where the run is kept.
        precision: device and autocast type.
        processes: this process and those that train with it. Rank 0 alone writes, reports and draws previews.
    """

    def __init__(
        self,
        config: ImageConfig | LatentConfig,
        stage: Stage,
        run_dir: RunDir,
        precision: Precision,
        processes: Processes = ALONE,
    ) -> None:
        self.config, self.stage, self.run_dir, self.precision = config, stage, run_dir, precision
        self.device, self.processes = precision.device, processes
        self.divided = DividedBatch(stage, config.train, precision, processes)
        optim = config.optimizer
        # Collected once: walking the modules takes longer than clipping.
        self.parameters = {name: list(module.parameters()) for name, module in stage.modules.items()}
        self.optimizer = torch.optim.AdamW(
            [p for parameters in self.parameters.values() for p in parameters],
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.scaler = precision.scaler()
        self.ema = Ema(stage.modules, config.train.ema_decay)
        self.power_averages = PowerAverages(stage.modules, config.train.ema_lengths)
        accelerate(stage.modules, config.train, self.device)
        self.step = self.seen = 0  # steps taken, and examples seen in them by all processes
        self.means, self.guard = Means(processes), StepGuard(optim, self.device)
        self.best: dict[str, float] = {}  # least held-out loss so far, and its step
        self.signals = Signals()
        self.fault = ""  # of data that this process could not read, which stops training like a signal

    def run(self, next_command: str = "") -> None:
        """Train up to `train.steps`, continuing the newest checkpoint of the run.

        next_command: what is said at the end about how to go on.

        Leaves with status 128 + signal after saving when SIGINT, SIGTERM or SIGHUP asks it, or any process that trains
        with it, to stop; after saving with a line and status 2 when data cannot be read. Raises ValueError when another
        process trains this run, when its checkpoints or train.init_from do not fit, OSError when files cannot be read
        or written, FloatingPointError when training has diverged, with the last checkpoint as it was.
        """
        with self.run_dir.locked() if self.processes.is_rank_0 else contextlib.nullcontext():
            self._run(next_command)

    def _run(self, next_command: str) -> None:
        train, first = self.config.train, self.processes.is_rank_0
        origin = self._resume()
        if self.step > train.steps:
            log.info(
                "%s is at step %d, past train.steps=%d: nothing is changed", self.run_dir.path, self.step, train.steps
            )
            return
        begun_at = self.step
        batches = itertools.islice(self.stage.batches(self.seen), max(train.steps - self.step, 0))
        if first:
            drop_snapshots(self.run_dir.path / FOLDER, self.step)
            self.run_dir.start(self.step, origin)
            announce(self.run_dir, self.stage, train, describe(self.device, self.precision.dtype), self.step)
        bar = tqdm(
            total=train.steps, initial=self.step, unit="step", disable=None if first else True, dynamic_ncols=True
        )
        clock, due = Clock(self.step, train.steps), False
        with self.signals, contextlib.closing(self.run_dir), bar:
            if first and self.step:
                self._make_up()
            while True:
                batch = self._next(batches)  # before they agree: what one cannot read stops all of them
                stop = self.processes.agree(signal.SIGCHLD if self.fault else self.signals.number)
                if stop or batch is None:
                    break
                self.train_step(batch)
                bar.update()
                done = self.step == train.steps
                if self.step % train.plot_graph_steps == 0:
                    means = self._shared_means()  # waits for the device, so the clock is read after the work is done
                    speed = clock.steps_per_second(self.step)
                    if first:
                        with self._faults():
                            self._report(bar, means, speed * train.batch_size, clock.time_left(self.step, speed))
                    self.means.clear()
                    self.guard.clear()
                    clock.restart(self.step)
                if first and train.ema_lengths and (self.step % train.ema_snapshot_steps == 0 or done):
                    self._save_snapshot()
                due |= self.step % train.checkpoint_steps == 0 or self._is_kept()
                if done or (due and not self.guard.read()[1]):
                    self._save()
                    due = False
                if self._shows():
                    if first:
                        self._save_previews()
                    clock.restart(self.step)
            saved = self.step > begun_at or stop != signal.SIGCHLD
            if stop:
                if saved:
                    self._save()
                self.processes.agree()  # the others wait for the first, whose state it is that counts
        if stop:
            if self.fault:
                leave([self.fault + (f" (training has reached step {self.step}; its state is saved)" if saved else "")])
            self.processes.agree()  # where another has a fault, all leave by it
            log.info("stopped by signal %d at step %d; the same command continues", stop, self.step)
            sys.exit(128 + stop)
        if first:
            conclude(self.run_dir, self.step, next_command)

    def _next(self, batches: Iterator[torch.Tensor]) -> torch.Tensor | None:
        """The next batch; None at the end, and where one cannot be read."""
        with self._faults():
            return None if self.fault else next(batches, None)
        return None

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """Note the fault that ends the block: training stops at the next step, after its state is saved."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.fault = one_line(error)

    def _is_kept(self) -> bool:
        """Whether train.keep_every keeps this step."""
        every = self.config.train.keep_every
        return bool(every) and self.step % every == 0

    def _shows(self) -> bool:
        """Whether previews are drawn of this step."""
        return self.step % self.config.train.plot_samples_steps == 0 or self.step == self.config.train.steps

    def _make_up(self) -> None:
        """Write what a process that was killed right after its checkpoint of this step did not come to."""
        for file in self._weights_files():
            if stored_step(file) < self.step:
                self._save_weights(file)
        if self._shows() and not self.run_dir.preview(self.step).exists():
            self._save_previews()

    def _save_previews(self) -> None:
        """Draw and write the previews of this step, unless a signal cuts it short; their failure is only told."""
        try:
            with self.signals.cutting_short():
                self.run_dir.save_previews(self.step, self.stage.previews(self.ema.modules))
                return
        except Exception as error:  # whatever it is: weeks of training do not depend on it
            log.warning("previews of step %d failed (%s: %s)", self.step, type(error).__name__, one_line(error))
            return
        log.info("previews of step %d were not finished", self.step)

    def _save_snapshot(self) -> None:
        """Write the power-function averages of this step."""
        try:
            save_snapshot(self.run_dir.path / FOLDER, self.step, self.power_averages, self.run_dir.plain_config)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from None

    def train_step(self, batch: torch.Tensor) -> None:
        """One step of the optimiser on `batch` (uint8 images, or latents), and of the EMA where it falls due."""
        train, optim = self.config.train, self.config.optimizer
        fraction = rate_factor(optim.schedule, self.step, train.steps, optim.warmup_steps, optim.schedule_ref_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate * fraction
        self.optimizer.zero_grad(set_to_none=True)
        scalars = self.divided.backward(batch, self.config.run.seed, self.step, self.scaler)
        self.scaler.unscale_(self.optimizer)
        norms = {name: self._clip(parameters) for name, parameters in self.parameters.items()}
        norm = torch.stack(list(norms.values())).norm()
        skip = self.guard.skips(norm)
        # The fused kernel leaves weights, moments and its count of steps alone where this is 1, without a wait for it.
        self.optimizer.found_inf = skip.float()
        self.optimizer.step()
        self.scaler.update()

        self.step += 1
        self.seen += train.batch_size
        if self.step % train.ema_update_every == 0:
            self.ema.update()
            self.power_averages.update()
        self.means.add(
            {
                "loss": scalars.pop("loss"),
                "grad_norm": norm,
                **scalars,
                **{f"grad_norm_{name}": n for name, n in norms.items() if len(norms) > 1},
            },
            taken=~skip,
        )

    def _clip(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Clip the gradients of one network (the authors clip encoder and denoiser apart); return the norm before."""
        limit = self.config.train.gradient_clip or math.inf
        return nn.utils.clip_grad_norm_(parameters, limit, foreach=True)

    def _report(self, bar: tqdm, means: dict[str, float], images_per_second: float, left: str) -> None:
        metrics = {
            "step": self.step,
            "images": self.seen,
            **means,
            "skipped_steps": self.guard.read()[0],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": round(images_per_second, 2),
        }
        if self.device.type == "cuda":
            metrics["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        with self._faults():
            metrics.update(self._held_out())
        self.run_dir.log(metrics)
        if bar.disable:
            log.info(
                "step %d/%d  loss %.4f  grad %.3f  %.1f images/s  %s left",
                self.step,
                self.config.train.steps,
                means["loss"],
                means["grad_norm"],
                images_per_second,
                left,
            )
        else:
            bar.set_postfix(loss=f"{means['loss']:.4f}", grad=f"{means['grad_norm']:.3f}")

    def _held_out(self) -> dict[str, float]:
        """The held-out loss, if this log line just passed a multiple of its interval; the best weights are kept."""
        every, stage = self.stage.held_out_steps, self.stage
        if not every or self.step // every == (self.step - self.config.train.plot_graph_steps) // every:
            return {}
        loss = stage.held_out_loss(self.ema.modules)
        if math.isfinite(loss) and loss < self.best.get("loss", math.inf):
            self.best = {"loss": loss, "step": self.step}
            header = {**self._header(), **stage.facts, stage.held_out: loss}
            save_weights(self.run_dir.path / BEST_WEIGHTS, stage.weights(self.ema.modules), header)
        return {stage.held_out: loss}

    def _shared_means(self) -> dict[str, float]:
        """The means since the last log line, the same in all processes; FloatingPointError after too many bad steps."""
        row, limit = self.guard.read()[1], self.config.optimizer.max_nonfinite_steps
        if row >= limit:
            if self.processes.is_rank_0:  # a signal may have saved one within the row
                drop_checkpoints(self.run_dir.checkpoints, self.step - row)
            raise self._diverged(f"the gradient was not finite in {row} steps in a row (max_nonfinite_steps={limit})")
        self.means.share()
        return self.means.read()

    def _diverged(self, reason: str) -> FloatingPointError:
        steps = checkpoint_steps(self.run_dir.checkpoints)
        kept = f"the checkpoint of step {steps[0]} is as it was: continue" if steps else "there is no checkpoint: begin"
        advice = "with a smaller optimizer.learning_rate or train.amp=false"
        return FloatingPointError(f"{reason} at step {self.step}; {kept} {advice}")

    def _save(self) -> None:
        self._shared_means()
        if not self.processes.is_rank_0:
            return
        train, row = self.config.train, self.guard.read()[1]
        state = {**state_of(self), **self._header()}
        keep = None if row else train.keep_checkpoints
        try:
            save_checkpoint(self.run_dir.checkpoints, self.step, state, keep, train.keep_every)
        except FloatingPointError as error:
            raise self._diverged(str(error)) from None
        for file in self._weights_files():
            self._save_weights(file)
        if row:
            log.warning("the gradient was not finite in the last %d steps, up to step %d", row, self.step)

    def _save_weights(self, file: Path) -> None:
        save_weights(file, self.stage.weights(self.ema.modules), {**self._header(), **self.stage.facts})

    def _weights_files(self) -> list[Path]:
        """The files of weights that belong to the checkpoint of this step."""
        run, row = self.run_dir.path, self.guard.read()[1]
        newest = [run / WEIGHTS] if not row or self.step == self.config.train.steps else []
        return newest + ([numbered_weights(run, self.step)] if self._is_kept() and not row else [])

    def _header(self) -> dict[str, Any]:
        return {
            "config": self.run_dir.plain_config,
            "step": self.step,
            "seed": self.config.run.seed,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    def _resume(self) -> dict[str, Any] | None:
        """Continue the newest checkpoint; which that is, rank 0 says, as it alone removes old ones.

        Without one, start from the run that train.init_from names, and return what that is for the history.
        """
        folder, fits = self.run_dir.checkpoints, partial(check_state, self)
        newest = self.processes.is_rank_0 and load_newest_checkpoint(folder, self.device, fits)
        state = newest or None
        step = self.processes.from_rank_0(lambda: None if state is None else state["step"])
        if step is None:
            return self._initialise()
        state = state or load_checkpoint(folder, step, self.device)
        restore(self, state, str(checkpoint_path(folder, step)))
        log.info("continuing %s at step %d", self.run_dir.path, self.step)
        return None

    def _initialise(self) -> dict[str, Any] | None:
        run = self.config.train.init_from
        if not run:
            return None
        line, event = take_over(run, self.stage.modules, self.run_dir.plain_config)
        self.ema.restart(self.stage.modules)
        log.info(line)
        return event
