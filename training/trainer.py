"""The training loop of both stages.

Everything random in step k follows from (run.seed, k) alone, so a resumed run draws what the uninterrupted
one would have drawn, and a state needs no random-number state beside its step.
"""

import logging
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from configs.schema import ImageConfig, LatentConfig
from diffusion.noise import derive_seed
from training.acceleration import accelerate
from training.checkpoint import checkpoint_steps, load_newest_checkpoint, save_checkpoint, save_weights
from training.ema import Ema
from training.precision import Precision
from training.run_dir import RunDir

log = logging.getLogger(__name__)


class Stage(Protocol):
    """What a training stage brings to the loop."""

    modules: dict[str, nn.Module]

    def batches(self, start_step: int) -> Iterator[torch.Tensor]:
        """Yield the batch of every step from `start_step` on, without end."""

    def loss(self, batch: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean loss of a batch and further scalars to log."""

    def pictures(self, averaged: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Return rows of pictures (N, C, H, W) made with the averaged weights."""

    def evaluate(self, averaged: dict[str, nn.Module], step: int) -> dict[str, float]:
        """Return held-out metrics if they fall due at the log line of `step`, else nothing."""

    def weights(self, averaged: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
        """Return the tensors of the inference file."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _StopDrawing(Exception):
    """A signal arrived while pictures were drawn."""


class Trainer:
    """Optimiser, averages, checkpoints and reports around a `Stage`.

    Args:
        config: configuration of the stage.
        stage: networks, data and loss.
        run_dir: where the run is kept.
        precision: device and autocast type.
    """

    def __init__(self, config: ImageConfig | LatentConfig, stage: Stage, run_dir: RunDir, precision: Precision) -> None:
        self.config, self.stage, self.run_dir, self.precision = config, stage, run_dir, precision
        self.device = precision.device
        optim = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [p for module in stage.modules.values() for p in module.parameters()],
            lr=optim.learning_rate,
            betas=(optim.adam_beta1, optim.adam_beta2),
            weight_decay=optim.weight_decay,
            fused=True,
        )
        self.scaler = precision.scaler()
        self.ema = Ema(stage.modules, config.train.ema_decay)
        accelerate(stage.modules, config.train, self.device)
        self.generator = torch.Generator(self.device)
        self.step = 0
        self.sums: dict[str, torch.Tensor] = {}  # of the scalars since the last log line, kept on the device
        self.summed = 0
        self._signal: int | None = None
        self._drawing = False

    def run(self) -> None:
        """Train up to `train.steps`, continuing the newest checkpoint of the run.

        Leaves with status 128 + signal after saving when SIGINT or SIGTERM asks it to stop. Raises ValueError when the
        run has weights but nothing to continue.
        """
        train = self.config.train
        self._resume()
        self.run_dir.start(self.step)
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=train.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True)
        clock, clock_step = time.perf_counter(), self.step
        try:
            batches = self.stage.batches(self.step)
            while self.step < train.steps and self._signal is None:
                self.train_step(next(batches))
                bar.update()
                if self.step % train.plot_graph_steps == 0:
                    self._check_finite()  # waits for the device, so the clock is read after the work is done
                    seconds = time.perf_counter() - clock
                    self._report(bar, (self.step - clock_step) * train.batch_size / seconds)
                    clock, clock_step = time.perf_counter(), self.step
                done = self.step == train.steps
                if self.step % train.plot_samples_steps == 0 or done:
                    self._save_pictures()
                    clock, clock_step = time.perf_counter(), self.step
                if self.step % train.checkpoint_steps == 0 or done:
                    self._save()
            if self._signal is not None:
                self._save()
        finally:
            bar.close()
            self.run_dir.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._signal is not None:
            log.info("stopped by signal %d at step %d; the same command continues", self._signal, self.step)
            sys.exit(128 + self._signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
        if self._drawing:
            raise _StopDrawing

    def _save_pictures(self) -> None:
        """Draw and write the pictures of this step; a signal cuts it short, as they may take minutes."""
        self._drawing = True
        try:
            self.run_dir.save_images(self.step, self.stage.pictures(self.ema.modules))
        except _StopDrawing:
            log.info("pictures of step %d were not finished", self.step)
        finally:
            self._drawing = False

    def train_step(self, batch: torch.Tensor) -> None:
        """One step of the optimiser on `batch` (uint8 images, or latents), and of the averages where they fall due."""
        train, optim = self.config.train, self.config.optimizer
        seed = derive_seed(self.config.run.seed, "step", self.step)
        self.generator.manual_seed(seed)
        torch.manual_seed(seed)  # dropout draws from the global generator
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate * min(1.0, (self.step + 1) / max(optim.warmup_steps, 1))

        with self.precision.autocast():
            loss, scalars = self.stage.loss(batch.to(self.device, non_blocking=True), self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norms = {name: self._clip(module) for name, module in self.stage.modules.items()}
        norm = torch.stack(list(norms.values())).norm()
        if not (optim.gradient_skip and norm.item() >= optim.gradient_skip_threshold):
            self.scaler.step(self.optimizer)
        self.scaler.update()

        self.step += 1
        if self.step % train.ema_update_every == 0:
            self.ema.update()
        self._accumulate(
            {
                "loss": loss.detach(),
                "grad_norm": norm,
                **scalars,
                **{f"grad_norm_{name}": n for name, n in norms.items() if len(norms) > 1},
            }
        )

    def _clip(self, module: nn.Module) -> torch.Tensor:
        """Clip the gradients of one network (the authors clip encoder and denoiser apart); return the norm before."""
        limit = self.config.train.gradient_clip or math.inf
        return nn.utils.clip_grad_norm_(module.parameters(), limit, foreach=True)

    def _accumulate(self, scalars: dict[str, torch.Tensor]) -> None:
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()
        self.summed += 1

    def _report(self, bar: tqdm, images_per_second: float) -> None:
        means = {name: (total / self.summed).item() for name, total in self.sums.items()}
        self.sums, self.summed = {}, 0
        metrics = {
            "step": self.step,
            "images": self.step * self.config.train.batch_size,
            **means,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_per_second": round(images_per_second, 2),
        }
        if self.device.type == "cuda":
            metrics["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        metrics.update(self.stage.evaluate(self.ema.modules, self.step))
        self.run_dir.log(metrics)
        if bar.disable:
            log.info(
                "step %d/%d  loss %.4f  grad %.3f  %.1f images/s",
                self.step,
                self.config.train.steps,
                means["loss"],
                means["grad_norm"],
                images_per_second,
            )
        else:
            bar.set_postfix(loss=f"{means['loss']:.4f}", grad=f"{means['grad_norm']:.3f}")

    def _check_finite(self) -> None:
        loss = self.sums["loss"].item() if self.sums else 0.0
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}; the last checkpoint is intact: "
                "continue with a smaller optimizer.learning_rate or train.amp=false"
            )

    def _save(self) -> None:
        self._check_finite()
        state = {
            "step": self.step,
            "modules": {name: module.state_dict() for name, module in self.stage.modules.items()},
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "stage": self.stage.state_dict(),
            "sums": self.sums,
            "summed": self.summed,
            **self._header(),
        }
        save_checkpoint(self.run_dir.checkpoints, self.step, state, self.config.train.keep_checkpoints)
        save_weights(self.run_dir.path / "weights.safetensors", self.stage.weights(self.ema.modules), self._header())

    def _header(self) -> dict[str, Any]:
        return {
            "config": self.run_dir.plain_config,
            "step": self.step,
            "seed": self.config.run.seed,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        }

    def _resume(self) -> None:
        weights = self.run_dir.path / "weights.safetensors"
        if weights.exists() and not checkpoint_steps(self.run_dir.checkpoints):
            raise ValueError(
                f"{weights} would be overwritten, with no training state to continue (an imported run has none); "
                "accepted: another run.experiment"
            )
        state = load_newest_checkpoint(self.run_dir.checkpoints, self.device)
        if state is None:
            return
        for name, module in self.stage.modules.items():
            module.load_state_dict(state["modules"][name])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.stage.load_state_dict(state["stage"])
        self.step, self.sums, self.summed = state["step"], state["sums"], state["summed"]
        log.info("continuing %s at step %d", self.run_dir.path, self.step)
