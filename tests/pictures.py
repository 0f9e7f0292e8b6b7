"""Small folders and zips of pictures, for the tests of metrics."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from metrics.images import ImageFolder


def noise(size: tuple[int, int], seed: int, channels: int = 3) -> np.ndarray:
    """Smooth random pixels, uint8 (H, W, C)."""
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray(chance.integers(0, 256, (4, 5, channels), dtype=np.uint8).squeeze())
    pixels = np.array(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)).reshape(*size, channels)
    return (pixels.astype(int) + chance.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)


def folder(path: Path, count: int, size: tuple[int, int] = (20, 24), first_seed: int = 0) -> Path:
    """Write `count` PNGs named 0000.png, 0001.png, ...; nested, to be found all the same."""
    for i in range(count):
        file = path / f"part{i % 2}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(size, first_seed + i)).save(file)
    return path


def images_of(path: Path, limit: int | None = None) -> ImageFolder:
    """Them, as metrics take them."""
    return ImageFolder(str(path), 3, "--samples", limit)


def zipped(path: Path, target: Path) -> Path:
    """The files of a folder as a zip."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(path.rglob("*.*")):
            archive.write(file, file.relative_to(path).as_posix())
    return target
