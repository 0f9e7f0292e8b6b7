"""A folder of samples: one PNG per seed, resumable, with a manifest and a contact sheet."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.field_pictures import field_picture
from data.names import MANIFEST
from data.pixels import to_uint8
from diffusion.coordinates import Size
from diffusion.process import DiffusionProcess
from diffusion.samplers import LastEstimate
from infty_diff.model import InftyDiff
from infty_diff.sampling import SamplingOptions
from runtime.claimed import FIELD, RAW, SEED, claim_folder, is_marked, open_png, save_png, whole_png
from runtime.files import file_digest, sweep, write_atomic
from runtime.lock import FolderLock
from runtime.processes import ALONE, Processes
from runtime.sheet import WIDTH, Row, save_sheet

_SHEET_IMAGES = 64  # images on the contact sheet


@dataclass(frozen=True)
class FolderOptions:
    """What a folder of samples holds.

    size: (H, W). sampling: sampler and steps of the images. latent_steps: step subset of the latent model, all if None.
    batch_size: images drawn together; does not change them. save_raw: keep the mollified images too, as float32
    `raw/000007.npy`, (C, H, W) before the Wiener filter; of fields in their own units.
    """

    size: Size
    sampling: SamplingOptions
    latent_steps: str | None = None
    batch_size: int = 16
    save_raw: bool = False


def draw_folder(
    model: InftyDiff,
    out_dir: Path,
    seeds: list[int],
    options: FolderOptions,
    provenance: dict[str, Any],
    processes: Processes = ALONE,
) -> int:
    """Draw the images that `out_dir` lacks as `{seed:06d}.png`; return how many were drawn.

    Fields are also `fields/{seed:06d}.npy`, float32 (C, H, W) in their own units, and their pictures have colour bars.

    Args:
        model: autoencoder and latent prior.
        out_dir: made if need be; images drawn into it before, which their headers tell, are kept.
        seeds: the images wanted.
        options: size, sampler, steps.
        provenance: what identifies the model, for `manifest.json`.
        processes: this process and those that share the work.
    Raises:
        ValueError: when the folder was made with other settings or another model, holds other pictures, or is in use.
    """
    settings = {"size": list(options.size), "sampling": asdict(options.sampling), "latent_steps": options.latent_steps}
    settings |= final_estimate(model.process) | orientation(model.config.data.origin)
    check_steps(model.process, options.sampling.steps, "images")
    if model.prior is not None and options.latent_steps is not None:
        check_steps(model.prior.process, options.latent_steps, "latent model")

    def claim() -> tuple[str, list[int]]:
        mark = claim_folder(out_dir, MANIFEST, {"settings": settings, "model": provenance})
        for folder in (out_dir, out_dir / "raw", out_dir / "fields"):
            sweep(folder, "*")
        return mark, [seed for seed in seeds if not _is_done(out_dir, seed, options, mark, model)]

    with FolderLock(out_dir) if processes.is_rank_0 else contextlib.nullcontext():
        mark, missing = processes.from_rank_0(claim)
        _draw_share(model, out_dir, missing, options, mark, processes)
        processes.agree()  # all images are there
        if processes.is_rank_0:
            contact_sheet(out_dir, mark)
    return len(missing)


def _draw_share(
    model: InftyDiff, out_dir: Path, missing: list[int], options: FolderOptions, mark: str, processes: Processes
) -> None:
    share = missing[processes.rank :: processes.world_size]
    # One at a time costs a CPU nothing, and makes the files equal bit for bit whatever is drawn beside them; a GPU
    # needs batches, whose size changes the rounding of its products.
    together = 1 if model.device.type == "cpu" else options.batch_size
    with tqdm(total=len(share), unit="image", disable=None if processes.is_rank_0 else True) as bar:
        for start in range(0, len(share), together):
            batch = share[start : start + together]
            _draw_batch(model, out_dir, batch, options, mark)
            bar.update(len(batch))


def final_estimate(process: DiffusionProcess) -> dict[str, str]:
    """What the settings of a folder say of how its images are found; nothing where a filter finds them."""
    return {"final_estimate": "network"} if process.gives_sharp else {}


def orientation(origin: str) -> dict[str, str]:
    """What the settings of a folder say of where pictures of fields show row 0; nothing where that is above."""
    return {} if origin == "upper" else {"origin": origin}


def check_steps(process: DiffusionProcess, steps: str, whose: str) -> None:
    """Refuse steps that a process does not have, before anything is written; the ValueError says `whose` they are."""
    try:
        process.respaced(steps)
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from None


def _draw_batch(model: InftyDiff, out_dir: Path, seeds: list[int], options: FolderOptions, mark: str) -> None:
    last = LastEstimate()
    together = {"latent_steps": options.latent_steps, "batch_size": len(seeds), "progress": False}
    mollified = model.sample(seeds, options.size, options.sampling, deblur=False, callback=last, **together)
    images = model.sharpened(mollified, last.denoised, options.sampling.inv_snr)
    if model.units is not None:
        mollified, images = model.units.undo(mollified), model.units.undo(images)
    for seed, raw, image in zip(seeds, mollified.cpu(), images.cpu()):
        texts = {SEED: str(seed)}
        if options.save_raw:
            texts[RAW] = save_npy(_raw_path(out_dir, seed), raw)
        if model.units is not None:
            texts[FIELD] = save_npy(_field_path(out_dir, seed), image)
        origin = model.config.data.origin
        image = to_uint8(image) if model.units is None else field_picture(image, model.units, origin=origin)
        save_png(out_dir / f"{seed:06d}.png", image, mark, texts)


def _raw_path(out_dir: Path, seed: int) -> Path:
    return out_dir / "raw" / f"{seed:06d}.npy"


def _field_path(out_dir: Path, seed: int) -> Path:
    return out_dir / "fields" / f"{seed:06d}.npy"


def save_npy(path: Path, raw: torch.Tensor) -> str:
    """Write a tensor of the CPU as an array, atomically; return the file's SHA-256. Who writes many sweeps before."""
    content = io.BytesIO()  # into a file on a full disk NumPy writes less, and says nothing
    np.save(content, raw.numpy())
    write_atomic(path, lambda temporary: temporary.write_bytes(content.getbuffer()), one_of_many=True)
    return hashlib.sha256(content.getbuffer()).hexdigest()


def _is_done(out_dir: Path, seed: int, options: FolderOptions, mark: str, model: InftyDiff) -> bool:
    """Whether the image of a seed is there, whole, of the right size, and was drawn into this folder."""
    shape, wanted = (model.channels, *options.size), tuple(options.size)
    if model.units is not None:
        wanted = tuple(field_picture(torch.zeros(shape), model.units).shape[1:])
    size, texts = whole_png(out_dir / f"{seed:06d}.png") or (None, {})
    if size != wanted or not is_marked(texts, mark) or texts.get(SEED) != str(seed):
        return False
    if options.save_raw and not is_whole_npy(_raw_path(out_dir, seed), shape, texts.get(RAW)):
        return False
    return model.units is None or is_whole_npy(_field_path(out_dir, seed), shape, texts.get(FIELD))


def is_whole_npy(path: Path, shape: tuple[int, ...], sha256: str | None) -> bool:
    """Whether a file holds a whole float32 array of this shape, with the checksum that is known of it, if any."""
    try:
        raw = np.load(path, mmap_mode="r", allow_pickle=False)  # a file that is cut cannot be mapped
    except (OSError, ValueError, EOFError):
        return False
    fits = isinstance(raw, np.ndarray) and raw.dtype == np.float32 and raw.shape == shape
    return fits and sha256 in (None, file_digest(path))


def contact_sheet(out_dir: Path, mark: str) -> None:
    """Write `contact_sheet.png` with the first images drawn into the folder, their seeds below them."""
    numbered = sorted(path for path in out_dir.glob("*.png") if re.fullmatch(r"\d{6,}\.png", path.name))
    drawn = (path for path in numbered if is_marked((whole_png(path) or ((), {}))[1], mark))
    files = list(itertools.islice(drawn, _SHEET_IMAGES))
    per_row = math.ceil(math.sqrt(len(files)))
    pictures = []
    for file in files:
        with open_png(file) as image:
            image.thumbnail((WIDTH // per_row, image.height))  # no more than the sheet shows is held
            pictures.append(image.copy())
    save_sheet(
        out_dir / "contact_sheet.png",
        [
            Row(pictures[start : start + per_row], captions=[f"seed {int(f.stem)}" for f in files[start:][:per_row]])
            for start in range(0, len(files), per_row)
        ],
    )
