"""The encodings of a data set, computed once and kept beside the run that made them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from configs.schema import DataConfig
from data.datasets import open_dataset
from data.latents import LatentSet
from data.loader import sequential
from data.pixels import to_float
from generation.infty_diff import WEIGHTS, InftyDiff
from training.checkpoint import load_weights, save_weights
from training.files import file_digest

log = logging.getLogger(__name__)
_BATCH = 32


def load_or_encode(model: InftyDiff, data: DataConfig, image_run: Path) -> LatentSet:
    """Encode the training images and their mirror images, or read them from the cache.

    The cache is `<image_run>/latents/<key>.safetensors`; the key is a digest of the weights' file and of the data
    set, so that training on, or changing the images, encodes anew.

    Args:
        model: the autoencoder.
        data: which images; its training split is encoded, mirrored too where training mirrored.
        image_run: the folder of the autoencoder's run.
    """
    dataset = open_dataset(data, "train")
    key = {"weights": file_digest(image_run / WEIGHTS), "data": dataset.fingerprint(), "flips": data.random_flip}
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()
    path = image_run / "latents" / f"{digest[:16]}.safetensors"
    if path.exists():
        tensors, header = load_weights(path)
        if header == key:
            log.info("latents of %d images from %s", len(dataset), path)
            return LatentSet.from_tensors({name: tensor.to(model.device) for name, tensor in tensors.items()})
    views = [_encode(model, dataset, data, flip) for flip in ((False, True) if data.random_flip else (False,))]
    mu, logvar = (None if parts[0] is None else torch.stack(parts, dim=1) for parts in zip(*views))
    latents = LatentSet.create(mu, logvar)
    save_weights(path, latents.to_tensors(), key)
    return latents


def _encode(model: InftyDiff, dataset, data: DataConfig, flip: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One view of the data set: mu (N, D), and logvar of a stochastic encoder or None."""
    count = -(-len(dataset) // _BATCH)
    name = "encoding mirrored images" if flip else "encoding images"
    parts = []
    for images in tqdm(sequential(dataset, _BATCH, flip=flip, num_workers=data.num_workers), name, count, disable=None):
        parts.append(model.encode_distribution(to_float(images)))
    mu, logvar = zip(*parts)
    return torch.cat(mu), None if logvar[0] is None else torch.cat(logvar)
