"""The encodings of a data set, computed once and kept beside the run that made them."""

from __future__ import annotations

import hashlib
import itertools
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from configs.schema import DataConfig
from data.base import ImageDataset
from data.datasets import open_dataset
from data.latents import LatentSet
from data.loader import sequential
from diffusion.transfer import to_device
from infty_diff.model import InftyDiff
from runtime.files import file_digest
from runtime.processes import ALONE, Processes
from runtime.weights import load_cache, save_weights

log = logging.getLogger(__name__)
_BATCH = 32


def load_or_encode(
    model: InftyDiff,
    data: DataConfig,
    weights: Path,
    processes: Processes = ALONE,
    dataset: ImageDataset | None = None,
) -> LatentSet:
    """Encode the training images and their mirror images in float32, or read them from the cache.

    The cache is `latents/<key>.safetensors` beside the weights; the key is a digest of their file and of the data set,
    so that training on, or changing the images, encodes anew.

    Args:
        model: the autoencoder.
        data: which images; its training split is encoded, mirrored too where training mirrored.
        weights: the file that the autoencoder was loaded from.
        processes: this process and those that share the work; all get the whole set.
        dataset: the training split, if it is open already.
    """
    dataset = dataset or open_dataset(data, "train")
    if model.units != getattr(dataset, "units", None) and model.units is not None:
        raise ValueError(
            f"data.root_dir: fields have {dataset.units}; accepted: the units of the weights, {model.units}"
        )
    key = {"weights": file_digest(weights), "data": dataset.fingerprint(), "flips": data.random_flip}
    digest = hashlib.sha256(repr(sorted(key.items())).encode()).hexdigest()
    path = weights.parent / "latents" / f"{digest[:16]}.safetensors"
    names = [dataset.item_name(i) for i in range(len(dataset))]
    size = model.config.model.z_dim
    encoded = len(names), 1 + data.random_flip, size
    shapes: dict[str, tuple[int | None, ...]] = {"mu": encoded, "mean": (size,), "std": (size,)}
    tensors = load_cache(path, key, shapes | ({"logvar": encoded} if model.config.model.stochastic_encoding else {}))
    if processes.agree(int(tensors is None)):
        full = model.in_full_precision()
        views = [_encode(full, dataset, data, flip, processes) for flip in (False, True)[: 1 + data.random_flip]]
        mu, logvar = (None if parts[0] is None else torch.stack(parts, dim=1) for parts in zip(*views))
        tensors = LatentSet.create(mu, logvar, names).to_tensors()
        if processes.is_rank_0:
            save_weights(path, tensors, key)
    else:
        log.info("latents of %d images from %s", len(dataset), path)
    return LatentSet.from_tensors({name: tensor.to(model.device) for name, tensor in tensors.items()}, names)


def _encode(
    model: InftyDiff, dataset: ImageDataset, data: DataConfig, flip: bool, processes: Processes
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One view of the data set: mu (N, D), and logvar of a stochastic encoder or None, on the CPU.

    Each process takes consecutive batches, the same as one process alone would: sizes of batches change the rounding.
    """
    total = -(-len(dataset) // _BATCH)
    first, last = (total * rank // processes.world_size for rank in (processes.rank, processes.rank + 1))
    share = range(first * _BATCH, min(last * _BATCH, len(dataset)))
    batches = sequential(dataset, _BATCH, flip=flip, num_workers=data.num_workers, indices=share)
    name = "encoding mirrored images" if flip else "encoding images"
    parts = []
    for images in tqdm(batches, name, last - first, disable=None if processes.is_rank_0 else True):
        parts.append(model.encode_distribution(to_device(images, model.device)))
    # Read at the end: a GPU would wait for the next batch while the host waits for this one.
    parts = [(mu.cpu(), None if logvar is None else logvar.cpu()) for mu, logvar in parts]
    mu, logvar = zip(*itertools.chain.from_iterable(processes.gather(parts)))
    return torch.cat(mu), None if logvar[0] is None else torch.cat(logvar)
