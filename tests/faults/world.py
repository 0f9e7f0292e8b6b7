"""A small world of runs, samples and pictures, the commands that add to it, and what they leave when nothing happens.

Every attempt begins with the same files at the same paths, so what a command leaves after a fault and a second try must
equal, bit for bit, what it leaves undisturbed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import forked
import micro
import pictures
import reference_files
from diffusion.factory import build_image_process
from diffusion.mollifier import InverseSnr
from infty_diff.filter_file import save_filter
from runtime.checkpoint import checkpoint_steps, load_checkpoint
from runtime.claimed import whole_png
from runtime.stored import WEIGHTS
from runtime.weights import load_weights

Attempt = tuple[str, Callable[[], str]]
_IMAGE, _LATENT = "configs/tiny_config.py", "configs/tiny_latent_config.py"
_PASSING = re.compile(r"\.lock|\..+\.tmp")  # what a process keeps in a folder while it lives
_FAST = "--sampling_steps=2 "
_SAVES = """import sys
sys.path[:0] = [{root!r}]
from infty_diff import InftyDiff
from runtime.command import readable_errors
with readable_errors():
    InftyDiff.from_runs({runs!r} + "/image", {runs!r} + "/latent", "cpu").save({here!r} + "/saved")
"""
# Command -> its script, which runs it is given (as what, and which fields), and its flags. {h} is where all lies.
_FIRST = {**micro.IMAGE, "train.keep_every": 4, "train.ema_lengths": "(0.1,0.2)", "train.ema_snapshot_steps": 2}
_READING = {"data.name": "ffhq", "data.root_dir": "{h}/pictures", "data.in_memory": "never", "data.num_workers": 1}
_TRAIN, _PRIOR = "train_inf_ae_diffusion.py", "train_latent_diffusion.py"
_EDIT = "--input={h}/pictures --num_images=2 --out_dir={h}/out " + _FAST
_GIVEN = "--seeds=0-1 " + _FAST + "--sensors={h}/"
_DRAW = _FAST + "--latent_sampling_steps=2 --save_raw "
_SCORE = "--samples={h}/samples --reference={h}/pictures --model=random_features --device=cpu "
COMMANDS: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]], str]] = {
    "stage one": (_TRAIN, {"config": ("new", {**_FIRST, "train.steps": 7})}, ""),
    "stage one, continued": (_TRAIN, {"config": ("image", {**_FIRST, "train.steps": 8})}, ""),
    "stage one on files": (_TRAIN, {"config": ("files", {**_FIRST, **_READING, "train.steps": 7})}, ""),
    "stage one on an archive": (_TRAIN, {"config": ("zip", {
        **_FIRST, "data.name": "ffhq", "data.root_dir": "{h}/pictures.zip", "train.steps": 2})}, ""),
    "stage one on a tar": (_TRAIN, {"config": ("tar", {
        **_FIRST, "data.name": "ffhq", "data.root_dir": "{h}/pictures.tar", "train.steps": 2})}, ""),
    "stage one on fields": (_TRAIN, {"config": ("fields", {
        **_FIRST, "data.name": "fields", "data.root_dir": "{h}/fields.npy", "train.steps": 2})}, ""),
    "stage one from another": (_TRAIN, {"config": ("new", {
        **_FIRST, "train.steps": 2, "train.init_from": "{h}/runs/image"})}, ""),
    "stage two": (
        _PRIOR, {"config": ("new", {**micro.LATENT, "train.steps": 20}), "decoder_config": ("image", {})}, ""),
    "stage two, continued": (
        _PRIOR, {"config": ("latent", {**micro.LATENT, "train.steps": 9}), "decoder_config": ("image", {})}, ""),
    "encoding": (_PRIOR, {"config": ("new", {**micro.LATENT, "train.steps": 1}), "decoder_config": ("image", {})},
                 "--decoder_run_weights=best"),
    "sampling": ("experiments/generate_samples.py", {"config": ("latent", {}), "decoder_config": ("image", {})},
                 _DRAW + "--seeds=0-5 --out_dir={h}/out"),
    "sampling, continued": (
        "experiments/generate_samples.py", {"config": ("latent", {}), "decoder_config": ("image", {})},
        _DRAW + "--seeds=0-3 --out_dir={h}/samples"),
    "sampling, kept weights": (
        "experiments/generate_samples.py", {"config": ("latent", {}), "decoder_config": ("image", {})},
        _DRAW + "--seeds=0 --out_dir={h}/out --decoder_run_weights=4 --inv_snr=0.1"),
    "sampling, calibrated": (
        "experiments/generate_samples.py", {"config": ("latent", {}), "decoder_config": ("image", {})},
        _DRAW + "--seeds=0 --out_dir={h}/out --inv_snr=calibrated"),
    "sampling, saved": (
        "experiments/generate_samples.py", {}, _DRAW + "--saved_model={h}/model --seeds=0 --out_dir={h}/out"),
    "scoring": ("experiments/calculate_fid.py", {}, _SCORE + "--cache_dir={h}/new"),
    "scoring, zip": ("experiments/calculate_fid.py", {}, _SCORE.replace("/samples ", "/samples.zip ")
                     + "--cache_dir={h}/new"),
    "scoring, cached": ("experiments/calculate_fid.py", {}, _SCORE + "--cache_dir={h}/cache"),
    "scoring, raw": ("experiments/calculate_fid.py", {"config": ("image", {})}, _SCORE.replace(
        "--reference={h}/pictures", "--protocol=reference") + "--cache_dir={h}/cache"),
    "neighbours": ("experiments/nearest_neighbours.py", {}, "--samples={h}/samples --reference={h}/pictures "
                   "--metric=pixels --device=cpu --cache_dir={h}/new --out_dir={h}/out"),
    "reconstructing": ("experiments/generate_recons.py", {"config": ("image", {})}, _EDIT),
    "inpainting": ("experiments/inpaint.py", {"config": ("image", {})}, _EDIT + "--seeds=0 --box=2,2,6,6"),
    "inpainting, mask": ("experiments/inpaint.py", {"config": ("image", {})}, _EDIT.replace("=2 ", "=1 ", 1)
                         + "--seeds=0 --mask={h}/mask.png"),
    "interpolating": ("experiments/interpolate.py", {"config": ("image", {})},
                      _EDIT.replace("--num_images=2 ", "--frames=3 ")),
    "enlarging": ("experiments/super_resolution.py", {"config": ("image", {})}, _EDIT + "--factor=2"),
    "conditioning": ("experiments/condition.py", {"config": ("image", {})}, _GIVEN + "sensors.csv --out_dir={h}/out"),
    "conditioning, arrays": (
        "experiments/condition.py", {"config": ("image", {})}, _GIVEN + "sensors.npz --out_dir={h}/out"),
    "conditioning, picture": (
        "experiments/condition.py", {"config": ("image", {})}, _GIVEN + "known.png --out_dir={h}/out"),
    "conditioning, continued": (
        "experiments/condition.py", {"config": ("image", {})}, _GIVEN + "sensors.csv --out_dir={h}/conditioned"),
    "averaging": ("experiments/choose_average.py", {"config": ("image", {})}, "--length=0.15"),
    "importing": (reference_files.COMMAND, {
        "config": ("new", {**micro.IMAGE, **reference_files.SQUARE}), "latent_config": ("new_latent", micro.LATENT)},
        "--checkpoint={h}/theirs/image --latent_checkpoint={h}/theirs/latent"),
    "preparing": ("data/prepare.py", {}, "--source={h}/pictures --out={h}/made.zip --size=16x12 --processes=1"),
    "saving": ("{h}/save.py", {}, ""),
}  # fmt: skip
ONCE = ("saving", "importing")  # which refuse to do again what is done
# What else the world begins with.
_MADE_BY = ("stage one, continued", "stage two, continued", "sampling, continued", "scoring, cached",
            "conditioning, continued", "saving")  # fmt: skip


def _write_inputs(here: Path) -> None:
    """Pictures, archives of them, fields, a mask and sensors, as users have them."""
    pictures.folder(here / "pictures", 12, (32, 24))
    pictures.zipped(here / "pictures", here / "pictures.zip")
    with tarfile.open(here / "pictures.tar", "w") as archive:
        archive.add(here / "pictures", "pictures")
    np.save(here / "fields.npy", np.stack([pictures.noise((16, 12), i).astype(np.float32) for i in range(12)]))
    mask = np.zeros((32, 24), np.uint8)
    mask[8:20, 6:15] = 255
    Image.fromarray(mask).save(here / "mask.png")
    Image.fromarray(np.dstack([pictures.noise((16, 12), 0), np.eye(16, 12, dtype=np.uint8) * 255])).save(
        here / "known.png"
    )
    y, x, value = np.linspace(0.1, 0.9, 5), np.full(5, 0.5), np.linspace(-0.5, 0.5, 15).reshape(5, 3)
    np.savez(here / "sensors.npz", y=y, x=x, value=value)
    lines = [f"{a},{b},{','.join(map(str, c))}" for a, b, c in zip(y, x, value)]
    (here / "sensors.csv").write_text("\n".join(["y,x,value1,value2,value3", *lines]) + "\n")


class World:
    """What lies under `here` when an attempt begins, and ways to look at what it has become."""

    def __init__(self, scratch: Path) -> None:
        self.here, self._base = scratch / "here", scratch / "base"
        self.runs = self.here / "runs"
        self._states: dict[bytes, bytes] = {}
        _write_inputs(self.here)
        saves = _SAVES.format(root=str(forked.ROOT), runs=str(self.runs), here=str(self.here))
        (self.here / "save.py").write_text(saves)
        (self.here / "theirs").mkdir()
        reference_files.write_theirs(self.here / "theirs")
        for name in _MADE_BY:
            done = forked.run([*self.command(name), *(["--config.train.steps=6"] if name.startswith("stage") else [])])
            assert done.returncode == 0, done.stderr
        (self.here / "saved").rename(self.here / "model")
        pictures.zipped(self.here / "samples", self.here / "samples.zip")
        mollifier = build_image_process(micro.image(self.runs)).mollifier
        save_filter(self.runs / "image" / WEIGHTS, mollifier, InverseSnr(0.25, (0.01, 0.02)), {"images": 2})
        shutil.copytree(self.here, self._base)
        self.initial = self.content()

    def fresh(self) -> None:
        """Begin again."""
        shutil.rmtree(self.here)
        shutil.copytree(self._base, self.here)

    def command(self, name: str) -> list[str]:
        """The command line of `COMMANDS`."""
        script, runs, flags = COMMANDS[name]
        line = [script]
        for flag, (experiment, fields) in runs.items():
            place = {"run.root_dir": self.runs, "run.device": "cpu", "run.experiment": experiment}
            second = "latent" in experiment or (script == _PRIOR and flag == "config")
            line.append(f"--{flag}={_LATENT if second else _IMAGE}")
            line += micro.arguments(flag, {**fields, **place})
        return [part.format(h=self.here) for part in [*line, *flags.split()]]

    @lru_cache  # noqa: B019  there is one world
    def undisturbed(self, name: str) -> tuple[dict[str, bytes], float]:
        """What the command leaves, and how long it takes."""
        self.fresh()
        begun = time.monotonic()
        done = forked.run(self.command(name))
        assert done.returncode == 0, done.stderr
        return self.content(), time.monotonic() - begun

    @lru_cache  # noqa: B019
    def kernels(self) -> Path:
        """A folder of caches with the compiled kernels."""
        self.fresh()
        folder = self._base.with_name("kernels")
        assert forked.run(self.command("sampling"), os.environ | {"XDG_CACHE_HOME": str(folder)}).returncode == 0
        return folder

    def content(self) -> dict[str, bytes]:
        """Every file, but for the speed in logs."""
        found = {}
        for path in sorted(self.here.rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                if path.name == "metrics.jsonl":
                    content = re.sub(rb', "images_per_second": [^,}]+', b"", content)
                if path.suffix == ".pt":
                    content = self._held(path, content)
                if path.suffix == ".json":
                    with contextlib.suppress(ValueError):
                        content = json.dumps(json.loads(content)).encode()
                found[str(path.relative_to(self.here))] = content
        return found

    def _held(self, path: Path, content: bytes) -> bytes:
        """Of a training state a digest of what it holds, which takes some time."""
        digest = hashlib.sha256(content).digest()
        if digest not in self._states:
            self._states[digest] = _canonical(path) or content
        return self._states[digest]

    def damage(self, name: str) -> str:
        """Whether what is there in the middle of a command, once its process is gone, is whole; "" or what is not."""
        end, start = self.undisturbed(name)[0], self.initial
        there = self.content()
        if lost := [file for file in start if file in end and file not in there]:
            return f"lost {lost[0]}"
        for file, content in there.items():
            if content not in (start.get(file), end.get(file)) and not _PASSING.fullmatch(Path(file).name):
                if not any(_PASSING.fullmatch(part) for part in Path(file).parts):
                    fault = _fault(self.here / file)
                    if fault:
                        return f"{file}: {fault}"
        return next(filter(None, map(log_fault, self.runs.iterdir())), "")

    def finish(self, name: str) -> str:
        """Give the command again, undisturbed; "" if all is as if nothing had happened."""
        end = self.undisturbed(name)[0]
        if name in ONCE and not self.difference(end):
            return ""
        return said(forked.run(self.command(name)), 0) or self.difference(end)

    def added(self, name: str) -> dict[str, bytes]:
        """Of what the command leaves, the files that it writes."""
        return {file: text for file, text in self.undisturbed(name)[0].items() if text != self.initial.get(file)}

    def difference(self, end: dict[str, bytes], but: tuple[str, ...] = ()) -> str:
        """Which files differ from those of `end`, names in `but` aside."""
        there = self.content()
        files = [f for f in {**end, **there} if there.get(f) != end.get(f) and Path(f).name not in but]
        how = {f: "more" if f not in end else "missing" if f not in there else "other" for f in files}
        return ", ".join(f"{file} is {word}" for file, word in how.items())


def _canonical(path: Path) -> bytes:
    """What a training state holds; its bytes also depend on which equal strings of it are one object in memory."""
    try:
        state = load_checkpoint(path.parent, int(path.stem.removeprefix("step_")))
    except (ValueError, OSError):
        return b""
    state.get("config", {}).get("train", {}).pop("steps", None)  # a run goes on with more of them
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {list(value.shape)}".encode() + value.numpy().tobytes())
        elif isinstance(value, (dict, list, tuple)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                sha.update(repr(key).encode())
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.digest()


def said(done: subprocess.CompletedProcess, *statuses: int) -> str:
    """What is wrong with how a command ended: with one of these statuses, in one line if that is 2."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode not in statuses or "Traceback" in done.stderr or (done.returncode == 2 and len(errors) != 1):
        told = [line for line in done.stderr.splitlines() if line.strip()][-4:]
        return f"status {done.returncode}, {len(errors)} lines of errors: {errors or told}"
    return ""


def _fault(path: Path) -> str:
    """What is wrong with a file of a name that promises a whole one."""
    try:
        if path.suffix == ".pt":
            load_checkpoint(path.parent, int(path.stem.removeprefix("step_")))
        elif path.suffix == ".safetensors":
            load_weights(path)
        elif path.suffix == ".png":
            return "" if whole_png(path) else "is no whole picture"
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def log_fault(run: Path) -> str:
    """A log has every step from the first on, and a state that is as new as its lines promise."""
    log = run / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []  # the last may be half written
    steps = [json.loads(line)["step"] for line in lines]
    if steps != list(range(1, len(steps) + 1)):
        return f"{run.name}: steps {steps} are logged"
    saved = checkpoint_steps(run / "checkpoints")
    promised = (len(steps) - 1) // 3 * 3  # micro runs save every third step, before the next is taken
    return "" if promised <= max(saved, default=0) else f"{run.name}: {saved} are saved, and {steps} logged"


def chance_of(seed: int, kind: str, number: int) -> random.Random:
    """The chance of one attempt, whichever others are made."""
    return random.Random(f"{seed} {kind} {number}")


@lru_cache(maxsize=1)
def world(scratch: Path) -> World:
    return World(scratch)


def turns(names: tuple[str, ...], count: int) -> Iterator[tuple[int, str]]:
    """`count` numbered turns of these commands."""
    return ((number, names[number % len(names)]) for number in range(count))
