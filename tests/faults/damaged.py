"""Files that are damaged in every way, and the commands that read them.

They are refused in one line that names the file, with nothing written, or made up for: then all is as with a whole one.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import forked
from faults.world import Attempt, World, chance_of, said, world
from runtime import checkpoint, weights
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.weights import load_weights, save_weights

_RUN, _PRIOR = "runs/image/", "runs/latent/"
_PARTS = ("averages", "checkpoints", "latents", "weights")  # folders of a run
# Which file (the first of a pattern), and by which command it is read.
READ = (
    (_RUN + "checkpoints/step_00000006.pt", "stage one, continued"),
    (_PRIOR + "checkpoints/step_00000006.pt", "stage two, continued"),
    (_RUN + "checkpoints/*.pt", "stage one, continued"),
    (_RUN + "weights.safetensors", "sampling"),
    (_RUN + "weights.safetensors", "stage one from another"),
    (_RUN + "weights/step_00000004.safetensors", "sampling, kept weights"),
    (_RUN + "best_weights.safetensors", "encoding"),
    (_PRIOR + "weights.safetensors", "sampling"),
    (_RUN + "averages/step_00000006.safetensors", "averaging"),
    (_RUN + "weights.safetensors", "averaging"),
    ("model/image.safetensors", "sampling, saved"),
    ("model/latent.safetensors", "sampling, saved"),
    (_RUN + "latents/*.safetensors", "stage two"),
    ("cache/features/*.safetensors", "scoring, cached"),
    (_RUN + "config.json", "stage one, continued"),
    (_RUN + "metrics.jsonl", "stage one, continued"),
    (_RUN + "history.jsonl", "stage one, continued"),
    (_RUN + "weights.filter.json", "sampling, calibrated"),
    ("samples/manifest.json", "sampling, continued"),
    ("samples/manifest.json", "scoring"),
    ("samples/000001.png", "sampling, continued"),
    ("samples/000001.png", "scoring"),
    ("samples/raw/000001.npy", "sampling, continued"),
    ("samples/raw/000001.npy", "scoring, raw"),
    ("samples.zip", "scoring, zip"),
    ("samples/000001.png", "neighbours"),
    ("sensors.csv", "conditioning"),
    ("sensors.npz", "conditioning, arrays"),
    ("known.png", "conditioning, picture"),
    ("conditioned/settings.json", "conditioning, continued"),
    ("conditioned/000001.png", "conditioning, continued"),
    ("conditioned/raw/000001.npy", "conditioning, continued"),
    ("conditioned/mean.npy", "conditioning, continued"),
    ("mask.png", "inpainting, mask"),
    ("pictures.zip", "stage one on an archive"),
    ("pictures.tar", "stage one on a tar"),
    ("fields.npy", "stage one on fields"),
    ("pictures/part0/0000.png", "stage one on files"),
    ("pictures/part0/0000.png", "reconstructing"),
    ("theirs/image/checkpoint.pkl", "importing"),
    ("theirs/latent/latents.pkl", "importing"),
    ("kernels/infty-diff/*.so", "sampling"),
)  # fmt: skip
# Without a checksum of ours: what is readable in them is taken.
_UNGUARDED = ("pictures", "theirs", "fields", "sensors", "known", "mask")
_ARCHIVE = "samples.zip"  # what is in it has checksums; bits of it that say nothing may differ
_LATE = ("pictures/", "stage one on files")  # read while training runs, which then has saved its state
_LOGS = ("metrics.jsonl", "history.jsonl")  # of which whole lines are kept

Damage = Callable[[bytes, random.Random], bytes]
BYTES: dict[str, Damage] = {
    "empty": lambda whole, chance: b"",
    "cut": lambda whole, chance: whole[: chance.randrange(1, len(whole))],
    "without its last byte": lambda whole, chance: whole[:-1],
    "zeros": lambda whole, chance: bytes(len(whole)),
    "a flipped bit": lambda whole, chance: _flipped(whole, chance.randrange(8 * len(whole))),
    "a flipped bit at its head": lambda whole, chance: _flipped(whole, chance.randrange(8 * min(len(whole), 64))),
    "null": lambda whole, chance: b"null",
    "[]": lambda whole, chance: b"[]",
    "no UTF-8": lambda whole, chance: b'{"a": "\xff\xfe"}\n',
    "a header of another kind": lambda whole, chance: chance.choice(_HEADERS) + whole[8:],
    "zeros in its middle": lambda whole, chance: _zeros_inside(whole),
}
_HEADERS = (
    b"\x89PNG\r\n\x1a\n",
    b"PK\x03\x04\x14\0\0\0",
    b"\x93NUMPY\1\0",
    (2**62).to_bytes(8, "little"),
    b"\x80\x04N",
)


def _flipped(whole: bytes, bit: int) -> bytes:
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _zeros_inside(whole: bytes) -> bytes:
    third = len(whole) // 3
    return whole[:third] + bytes(third) + whole[2 * third :]


# What else a file of tensors can be: changes of (tensors, header), or of a training state.
def _missing(tensors: dict) -> None:
    tensors.pop(next(iter(tensors)))


def _extra(tensors: dict) -> None:
    tensors["more"] = torch.ones(2)


def _reshaped(tensors: dict) -> None:
    name = next(name for name, value in tensors.items() if value.ndim)
    tensors[name] = torch.ones(*tensors[name].shape, 2)


def _not_numbers(tensors: dict) -> None:
    name = next(name for name, value in tensors.items() if value.is_floating_point() and value.ndim)
    tensors[name] = torch.full_like(tensors[name], torch.nan)


TENSORS = {"a missing tensor": _missing, "an extra tensor": _extra, "another shape": _reshaped, "NaN": _not_numbers}


def _rewritten(path: Path, change: Callable[[dict], None], number: int = checkpoint.FORMAT) -> None:
    """Write a file of tensors anew, with a change, as of a format."""
    places, kept = (checkpoint, weights), (checkpoint.require_finite, checkpoint.FORMAT)
    if path.suffix == ".pt":
        step = int(path.stem.removeprefix("step_"))
        state = load_checkpoint(path.parent, step)
        change(next(iter(state["modules"].values())))
        write = partial(save_checkpoint, path.parent, step, state, None)
    else:
        tensors, header = load_weights(path)
        change(tensors)
        write = partial(save_weights, path, tensors, header)
    for module in places:
        module.require_finite, module.FORMAT = lambda state: None, number
    try:
        write()
    finally:
        for module in places:
            module.require_finite, module.FORMAT = kept


def _of_another(here: World, path: Path, chance: random.Random) -> None:
    """Put a file of the same format from elsewhere in its place: of another run, stage or command."""
    _replaced(path, [p for p in here.here.rglob(f"*{path.suffix}") if _run_of(p) != _run_of(path)], chance)


def _of_its_run(here: World, path: Path, chance: random.Random) -> None:
    """Put another file of its run in its place: of another step, of another kind."""
    _replaced(path, list(_run_of(path).rglob(f"*{path.suffix}")), chance)


def _run_of(path: Path) -> Path:
    """The folder of the run, model or cache that a file is in."""
    return path.parent.parent if path.parent.name in _PARTS else path.parent


def _replaced(path: Path, others: list[Path], chance: random.Random) -> None:
    """Weights of the same networks are weights like these, unless a name says of which step they are."""
    others = [other for other in others if other.read_bytes() != path.read_bytes()]
    if path.suffix == ".safetensors" and not path.stem.startswith("step_"):
        others = [other for other in others if load_weights(other)[0].keys() != load_weights(path)[0].keys()]
    path.write_bytes(chance.choice(sorted(others)).read_bytes() if others else b"")


def _damages(path: str) -> dict[str, Callable[[World, Path, random.Random], None]]:
    def of_bytes(damage: Damage) -> Callable[[World, Path, random.Random], None]:
        return lambda here, path, chance: _write(path, damage(path.read_bytes(), chance))

    found = {name: of_bytes(damage) for name, damage in BYTES.items()}
    if path.endswith((".pt", ".safetensors")):
        changes = {name: partial(_rewritten, change=change) for name, change in TENSORS.items()}
        changes["a newer format"] = partial(_rewritten, change=lambda tensors: None, number=99)
        found |= {name: lambda here, path, chance, change=change: change(path) for name, change in changes.items()}
        found["of another run"] = _of_another
        if _RUN in path or _PRIOR in path:
            found["another file of its run"] = _of_its_run
    return found


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def attempts(scratch: Path, seed: int) -> Iterator[Attempt]:
    number = 0
    for path, command in READ:
        for name, damage in _damages(path).items():
            yield f"{path} is {name}, {command}", partial(read, scratch, path, command, damage, seed, number)
            number += 1


def read(scratch: Path, pattern: str, command: str, damage: Callable, seed: int, number: int) -> str:
    here, chance = world(scratch), chance_of(seed, "damaged", number)
    end, caches = here.undisturbed(command)[0], here.here / "kernels"
    kernels = here.kernels() if pattern.startswith("kernels") else None
    here.fresh()
    if kernels:
        shutil.copytree(kernels, caches)
    paths = sorted(here.here.glob(pattern))
    whole, stored = here.content(), {path: path.read_bytes() for path in paths}
    for path in paths:
        damage(here, path, chance)
    before = here.content()
    done = forked.run(here.command(command), os.environ | ({"XDG_CACHE_HOME": str(caches)} if kernels else {}))
    shutil.rmtree(caches, ignore_errors=True)
    fault = said(done, 0, 2)
    names = {name for path in paths for name in (path.name, path.parent.name)}
    if done.returncode == 2:
        if not any(name in done.stderr for name in names):
            fault = fault or f"does not name the file: {done.stderr[-300:]}"
        if pattern.startswith(_LATE[0]) and command == _LATE[1]:
            for path, content in stored.items():
                path.write_bytes(content)
            return fault or here.damage(command) or here.finish(command)
        return fault or here.difference(before)
    if fault or pattern.startswith(_UNGUARDED) or all(before[f] == whole.get(f) for f in before):
        return fault
    return _made_up(here, paths, end, (_ARCHIVE,) if pattern == _ARCHIVE else ())


def _made_up(here: World, paths: list[Path], end: dict[str, bytes], but: tuple[str, ...]) -> str:
    """Whether a command that went on left what it leaves with whole files; damaged states may be kept aside."""
    names = [path.name for path in paths]
    if paths[0].name in _LOGS:
        for line in paths[0].read_bytes().splitlines()[1:] if paths[0].name == "metrics.jsonl" else ():
            json.loads(line)
    aside = (*(f"{name}.damaged" for name in names), *_LOGS, *but)
    return here.difference(end, aside)
