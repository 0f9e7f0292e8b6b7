"""A baseline: train the U-Net of the package denoising-diffusion-pytorch on the data of a configuration, draw samples.

    python benchmarks/other_library.py --config configs/landscapes_32_config.py --out_dir=BASELINE --seconds=7200
    python experiments/calculate_fid.py --config configs/landscapes_32_config.py --samples=BASELINE/samples_100 \\
        --split=val --model=efficientnet_lite0

The package comes with the extra `baseline`. Network, diffusion (v-prediction on white noise, sigmoid schedule), average
of weights and sampler (DDIM) are the library's. Of the configuration count the sections `data` and `optimizer`, of the
others train.steps, batch_size, gradient_clip, ema_decay, ema_update_every, checkpoint_steps, amp, run.seed and
run.device. The images of a step are those that our training takes at that step.

--seconds ends the training, and with it the schedule of the learning rate, before train.steps: processor time on a CPU,
time on the clock on a GPU. The default --dim and --dim_mults have 2.61 M parameters; landscapes_32 has 2.63 M, its
latent model included. In --out_dir: state.pt, result.json, and a folder of samples. Run again, it goes on.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from absl import flags
from tqdm import tqdm

from benchmarks.report import machine
from configs.schema import MOST_SAMPLES, ImageConfig
from data.base import ImageDataset
from data.datasets import open_dataset
from data.loader import batches
from data.names import MANIFEST
from data.pixels import to_uint8
from diffusion.random import Purpose, seed_global
from diffusion.transfer import to_device
from runtime.checkpoint import load_plain
from runtime.claimed import SEED, claim_folder, is_marked, save_png, whole_png
from runtime.command import Command, readable_errors
from runtime.files import file_digest, write_atomic, write_json
from runtime.precision import Precision, pick_device
from runtime.signals import Signals
from training.rates import rate_factor

FLAGS = flags.FLAGS
flags.DEFINE_string("out_dir", None, "folder of everything")
flags.DEFINE_float("seconds", None, "train for so long; default: train.steps", lower_bound=1e-3, upper_bound=1e9)
flags.DEFINE_integer("dim", 32, "channels of the finest level", lower_bound=4, upper_bound=4096)
flags.DEFINE_list("dim_mults", ["1", "2", "4"], "channel multiplier of each level")
flags.DEFINE_integer("num_samples", 500, "samples drawn", lower_bound=1, upper_bound=MOST_SAMPLES)
flags.DEFINE_integer("sampling_steps", 100, "steps of DDIM", lower_bound=1, upper_bound=1000)
flags.DEFINE_integer("sample_batch_size", 50, "samples drawn together; they depend on it", lower_bound=1)


class Baseline:
    """The library's diffusion, its average and an optimiser, trained on images of a configuration."""

    def __init__(self, config: ImageConfig, images: ImageDataset, out: Path) -> None:
        try:
            from denoising_diffusion_pytorch import GaussianDiffusion, Unet
            from ema_pytorch import EMA
        except ImportError as error:
            raise ValueError(f"{error}; accepted: with the package, pip install -e '.[baseline]'") from None
        levels = 2 ** (len(FLAGS.dim_mults) - 1)
        if any(side % levels for side in config.size):
            raise ValueError(f"--dim_mults has {len(FLAGS.dim_mults)} levels; accepted: sides that {levels} divides")
        self.config, self.images, self.out = config, images, out
        self.device = pick_device(config.run.device)
        self.precision = Precision.create(self.device, config.train.amp, config.train.amp_dtype)
        seed_global(config.run.seed, Purpose.WEIGHTS)
        unet = Unet(FLAGS.dim, dim_mults=tuple(map(int, FLAGS.dim_mults)), channels=config.data.channels)
        diffusion = GaussianDiffusion(unet, image_size=config.size, sampling_timesteps=FLAGS.sampling_steps)
        self.diffusion = diffusion.to(self.device)
        self.average = EMA(self.diffusion, beta=config.train.ema_decay, update_every=config.train.ema_update_every)
        optimizer = config.optimizer
        betas = (optimizer.adam_beta1, optimizer.adam_beta2)
        self.optimizer = torch.optim.Adam(self.diffusion.parameters(), optimizer.learning_rate, betas)
        self.scaler = self.precision.scaler()
        self.step, self.seconds, self.parameters = 0, 0.0, sum(p.numel() for p in unet.parameters())

    def _parts(self) -> dict[str, Any]:
        names = ("diffusion", "average", "optimizer", "scaler")
        return {name: getattr(self, name) for name in names}

    def resume(self) -> None:
        """Go on from the state in the folder, if there is one."""
        if (self.out / "state.pt").exists():
            state = load_plain(self.out / "state.pt", self.device)
            self.step, self.seconds = state["step"], state["seconds"]
            for name, part in self._parts().items():
                part.load_state_dict(state[name])

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"step": self.step, "seconds": self.seconds}
        write_atomic(self.out / "state.pt", lambda path: torch.save(state, path))

    def train(self) -> None:
        """Up to train.steps or --seconds; leaves after saving when a signal asks it to."""
        train, optimizer, cuda = self.config.train, self.config.optimizer, self.device.type == "cuda"
        clock = time.perf_counter if cuda else time.process_time
        seed_global(self.config.run.seed, Purpose.BENCHMARK, 0, self.step, device=self.device)
        flip, workers = self.config.data.random_flip, self.config.data.num_workers
        order = batches(self.images, train.batch_size, seed=self.config.run.seed, seen=self.step * train.batch_size,
                        flip=flip, num_workers=workers, pin_memory=cuda)  # fmt: skip
        begun, begun_at = clock() - self.seconds, self.step
        with Signals() as signals, tqdm(total=train.steps, initial=self.step, unit="step", disable=None) as bar:
            while (done := self._progress()) < train.steps and not signals.number:
                factor = rate_factor(optimizer.schedule, done, train.steps, optimizer.warmup_steps,
                                     optimizer.schedule_ref_steps)  # fmt: skip
                for group in self.optimizer.param_groups:
                    group["lr"] = factor * optimizer.learning_rate
                with self.precision.autocast():
                    loss = self.diffusion(to_device(next(order), self.device).float() / 255)
                self.scaler.scale(loss).backward()
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), train.gradient_clip or float("inf"))
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.average.update()
                self.step += 1
                if self.step % train.plot_graph_steps == 0:
                    bar.set_postfix(loss=f"{loss.item():.4f}")  # waits for a GPU
                self.seconds = clock() - begun
                if self.step % train.checkpoint_steps == 0:
                    self.save()
                bar.update()
        if self.step > begun_at:
            self.save()
        if signals.number:
            sys.exit(128 + signals.number)

    def _progress(self) -> int:
        """Steps taken, or in their place the same fraction of --seconds where that is more."""
        steps = self.config.train.steps
        return max(self.step, int(steps * self.seconds / FLAGS.seconds) if FLAGS.seconds else 0)

    def sample(self) -> Path:
        """Draw what is missing of --num_samples; the folder."""
        folder = self.out / f"samples_{FLAGS.sampling_steps}"
        settings = {"steps": FLAGS.sampling_steps, "batch": FLAGS.sample_batch_size, "size": list(self.config.size)}
        model = {"state": file_digest(self.out / "state.pt"), "step": self.step}
        mark = claim_folder(folder, MANIFEST, {"settings": settings, "model": model})

        def missing(number: int) -> bool:
            found = whole_png(folder / f"{number:06d}.png")
            return found is None or not is_marked(found[1], mark)

        self.average.ema_model.eval()
        for first in range(0, FLAGS.num_samples, FLAGS.sample_batch_size):
            numbers = range(first, min(first + FLAGS.sample_batch_size, FLAGS.num_samples))
            if any(map(missing, numbers)):
                seed_global(self.config.run.seed, Purpose.BENCHMARK, 1, first, device=self.device)
                drawn = self.average.ema_model.sample(batch_size=FLAGS.sample_batch_size)
                for number, image in zip(numbers, to_uint8(2 * drawn.cpu() - 1)):
                    save_png(folder / f"{number:06d}.png", image, mark, {SEED: str(number)})
        return folder


def main(configs: dict[str, Any], _: dict[str, list[str]]) -> None:
    config: ImageConfig = configs["config"]
    with readable_errors():
        if not FLAGS.out_dir:
            raise ValueError("--out_dir is missing; accepted: a folder")
        if not all(part.isdecimal() and int(part) for part in FLAGS.dim_mults):
            raise ValueError(f"--dim_mults is {','.join(FLAGS.dim_mults)}; accepted: whole numbers above 0")
        out, images = Path(FLAGS.out_dir), open_dataset(config.data, "train")
        baseline = Baseline(config, images, out)
        settings = {"data": images.fingerprint(), "batch_size": config.train.batch_size, "seed": config.run.seed,
                    "optimizer": asdict(config.optimizer)}  # fmt: skip
        claim_folder(out, "settings.json", {**settings, "network": [FLAGS.dim, *FLAGS.dim_mults]})
        baseline.resume()
        baseline.train()
        folder = baseline.sample()
        result = {"benchmark": "other_library", **machine(baseline.device), "parameters": baseline.parameters,
                  "steps": baseline.step, "images": baseline.step * config.train.batch_size,
                  "seconds": baseline.seconds}  # fmt: skip
        write_json(out / "result.json", {**result, **settings})
    print(f"{result['parameters'] / 1e6:.2f} M parameters, {result['steps']} steps, {result['images']} images, "
          f"{result['seconds']:.0f} s on {result['device']}\nsamples: {folder}")  # fmt: skip


if __name__ == "__main__":
    Command(__doc__, {"config": ImageConfig}, as_given=("config",)).run(main)
