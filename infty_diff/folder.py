"""A folder of samples: one PNG per seed, resumable, with a manifest and a contact sheet."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data.pixels import to_pictures, to_uint8
from diffusion.coordinates import Size
from diffusion.process import DiffusionProcess
from diffusion.samplers import LastEstimate
from infty_diff.model import InftyDiff
from infty_diff.sampling import SamplingOptions
from runtime.files import plain, write_atomic, write_json
from runtime.processes import ALONE, Processes
from runtime.sheet import WIDTH, Row, save_sheet

_SHEET_IMAGES = 64  # images on the contact sheet


@dataclass(frozen=True)
class FolderOptions:
    """What a folder of samples holds.

    size: (H, W). sampling: sampler and steps of the images. latent_steps: step subset of the latent model, all if None.
    batch_size: images drawn together; does not change them. save_raw: keep the mollified images too, as float32
    `raw/000007.npy`, (C, H, W) before the Wiener filter.
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

    Args:
        model: autoencoder and latent prior.
        out_dir: made if need be; images already in it are kept.
        seeds: the images wanted.
        options: size, sampler, steps.
        provenance: what identifies the model, for `manifest.json`.
        processes: this process and those that share the work.
    Raises:
        ValueError: when the folder was made with other settings or another model.
    """
    settings = {"size": list(options.size), "sampling": asdict(options.sampling), "latent_steps": options.latent_steps}
    settings |= final_estimate(model.process)
    check_steps(model.process, options.sampling.steps, "sampling_steps")
    if model.prior is not None and options.latent_steps is not None:
        check_steps(model.prior.process, options.latent_steps, "latent_sampling_steps")

    def claim() -> list[int]:
        claim_folder(out_dir, "manifest.json", {"settings": settings, "model": provenance})
        return [seed for seed in seeds if not _is_done(out_dir, seed, options)]

    missing = processes.from_rank_0(claim)
    share = missing[processes.rank :: processes.world_size]
    # One at a time costs a CPU nothing, and makes the files equal bit for bit whatever is drawn beside them; a GPU
    # needs batches, whose size changes the rounding of its products.
    together = 1 if model.device.type == "cpu" else options.batch_size
    with tqdm(total=len(share), unit="image", disable=None if processes.is_rank_0 else True) as bar:
        for start in range(0, len(share), together):
            batch = share[start : start + together]
            _draw_batch(model, out_dir, batch, options)
            bar.update(len(batch))
    processes.agree()  # all images are there
    if processes.is_rank_0:
        contact_sheet(out_dir)
    return len(missing)


def final_estimate(process: DiffusionProcess) -> dict[str, str]:
    """What the settings of a folder say of how its images are found; nothing where a filter finds them."""
    return {"final_estimate": "network"} if process.gives_sharp else {}


def check_steps(process: DiffusionProcess, steps: str, flag: str) -> None:
    """Refuse steps that a process does not have, before anything is written; ValueError naming `flag`."""
    try:
        process.respaced(steps)
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from None


def _draw_batch(model: InftyDiff, out_dir: Path, seeds: list[int], options: FolderOptions) -> None:
    last = LastEstimate()
    together = {"latent_steps": options.latent_steps, "batch_size": len(seeds), "progress": False}
    mollified = model.sample(seeds, options.size, options.sampling, deblur=False, callback=last, **together)
    images = to_uint8(model.sharpened(mollified, last.denoised, options.sampling.inv_snr)).cpu()
    for seed, raw, image in zip(seeds, mollified.cpu(), images):
        if options.save_raw:
            write_atomic(_raw_path(out_dir, seed), lambda path, raw=raw: _save_npy(path, raw))
        save_png(out_dir / f"{seed:06d}.png", image)


def _raw_path(out_dir: Path, seed: int) -> Path:
    return out_dir / "raw" / f"{seed:06d}.npy"


def _save_npy(path: Path, raw: torch.Tensor) -> None:
    with path.open("wb") as file:
        np.save(file, raw.numpy())


def save_png(path: Path, image: torch.Tensor, texts: Mapping[str, str] | None = None) -> None:
    """Write uint8 (C, H, W) as PNG, atomically, with texts in its header by their keywords."""
    (picture,) = to_pictures(image[None])
    info = PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    write_atomic(path, lambda temporary: picture.save(temporary, format="png", pnginfo=info))


def whole_png(path: Path) -> tuple[Size, dict[str, str]] | None:
    """The size (H, W) and the texts of a PNG if it is there and undamaged."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            size, texts = image.size[::-1], {k: v for k, v in image.info.items() if isinstance(v, str)}
            image.verify()
            return size, texts
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None


def _is_done(out_dir: Path, seed: int, options: FolderOptions) -> bool:
    """Whether the image of a seed is there, whole and of the right size."""
    if options.save_raw and not _raw_path(out_dir, seed).exists():
        return False
    found = whole_png(out_dir / f"{seed:06d}.png")
    return found is not None and found[0] == tuple(options.size)


def claim_folder(out_dir: Path, name: str, wanted: dict[str, Any]) -> None:
    """Write what a folder is to hold into a JSON file in it, unless that is there and says something else.

    Args:
        out_dir: made if need be.
        name: of the file.
        wanted: plain values, by parts that the error names.
    Raises:
        ValueError: when the folder holds something else.
    """
    path = out_dir / name
    wanted = plain(wanted)
    try:
        there = json.loads(path.read_text()) if path.exists() else wanted
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error}); accepted: another --out_dir") from None
    if there != wanted:
        parts = [name for name in wanted if there.get(name) != wanted[name]]
        raise ValueError(
            f"--out_dir={out_dir}: holds results of other {' and '.join(parts)} "
            f"(see its {name}); accepted: an empty folder or the same settings"
        )
    write_json(path, wanted)


def contact_sheet(out_dir: Path) -> None:
    """Write `contact_sheet.png` with the first images of the folder, their seeds below them."""
    files = sorted(path for path in out_dir.glob("*.png") if re.fullmatch(r"\d{6,}\.png", path.name))[:_SHEET_IMAGES]
    per_row = math.ceil(math.sqrt(len(files)))
    pictures = []
    for file in files:
        with Image.open(file, formats=("PNG",)) as image:
            image.thumbnail((WIDTH // per_row, image.height))  # no more than the sheet shows is held
            pictures.append(image.copy())
    save_sheet(
        out_dir / "contact_sheet.png",
        [
            Row(pictures[start : start + per_row], captions=[f"seed {int(f.stem)}" for f in files[start:][:per_row]])
            for start in range(0, len(files), per_row)
        ],
    )


def parse_size(text: str, flag: str = "sample_img_size") -> Size:
    """ "256" -> (256, 256); "192x320" -> (192, 320), height first.

    Raises:
        ValueError: for anything else, naming `flag`.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise ValueError(f"--{flag}={text}: accepted: a side, 256, or height x width, 192x320")
    return int(match[1]), int(match[2] or match[1])


def parse_seeds(text: str) -> list[int]:
    """ "0-99" or "3,7,10-12" -> ascending seeds without repetition.

    Raises:
        ValueError: for anything else.
    """
    seeds: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--seeds={text}: accepted: numbers and ranges, e.g. 0-99 or 3,7,10-12")
        seeds.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(seeds)
