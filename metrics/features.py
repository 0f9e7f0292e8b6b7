"""Features of image sets, and their cache on the disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffusion.random import Purpose, numpy_stream
from metrics.extractors import Extractor
from metrics.images import ImageSet
from runtime.files import plain
from runtime.weights import load_cache, save_weights

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extraction:
    """How features and their distances are computed; changes no value.

    batch_size: images in the network at once; 0 = 64 on a GPU, 4 on a CPU, whose caches hold no more.
    threads: decoding. cache_dir: where features of references are kept. device: of the network and the distances.
    """

    batch_size: int = 0
    threads: int = 8
    cache_dir: Path = Path("~/.cache/infty-diff")
    device: torch.device | str = "cpu"

    @property
    def together(self) -> int:
        """Images in the network at once."""
        return self.batch_size or (4 if torch.device(self.device).type == "cpu" else 64)


def features(
    images: ImageSet, extractor: Extractor, how: Extraction, *, patches: int = 0, title: str = "images"
) -> torch.Tensor:
    """Features of every image, or of `patches` random patches of each.

    A patch has the size of the extractor's input and is cut out without any resize, so that detail finer than that
    input counts (patch FID, as in Chai et al. 2022). Where it is cut depends on the image's position in the set alone.

    Returns:
        (N, D), or (N·patches, D), float32 on the CPU.
    Raises:
        ValueError: for a damaged image, or one smaller than a patch.
    """
    load = partial(_whole, images, extractor) if not patches else partial(patch, images, extractor, patches)
    count = len(images) * max(1, patches)
    parts = []
    with tqdm(total=count, desc=title, unit="patch" if patches else "image", disable=None, leave=False) as bar:
        # Convolutions in TensorFloat-32 would move the features in the third digit. Not inference mode: what a model
        # keeps from one call to the next would then be of no use where gradients are asked for.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for batch in _loaded(load, count, how):
                parts.append(extractor.network(batch).float().cpu())
                bar.update(len(batch))
    return torch.cat(parts)


def cached_features(
    images: ImageSet, extractor: Extractor, how: Extraction, *, patches: int = 0, title: str = "images"
) -> torch.Tensor:
    """`features`, read from the cache when the same images and extractor were seen before."""
    key = plain({"images": images.fingerprint(), "extractor": extractor.identity(), "patches": patches})
    name = hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()[:24]
    path = how.cache_dir.expanduser() / "features" / f"{name}.safetensors"
    tensors = load_cache(path, key, {"features": (len(images) * max(1, patches), None)})
    if tensors is not None:
        _log.info("features of %d %s from %s", len(tensors["features"]), title, path)
        return tensors["features"]
    computed = features(images, extractor, how, patches=patches, title=title)
    save_weights(path, {"features": computed}, key)
    return computed


def _whole(images: ImageSet, extractor: Extractor, i: int) -> torch.Tensor:
    return _tensor(extractor.prepare(images[i]))


def patch(images: ImageSet, extractor: Extractor, patches: int, i: int) -> torch.Tensor:
    """Patch i of a set of `patches` an image, (C, h, w); ValueError where the image is smaller."""
    index, number = divmod(i, patches)
    image, (height, width) = images[index], extractor.input_size
    room = image.shape[0] - height, image.shape[1] - width
    if min(room) < 0:
        raise ValueError(
            f"patches is {patches}, and {images.path}: {images.item_name(index)} is {image.shape[0]}x{image.shape[1]}; "
            f"accepted: images of at least {height}x{width}, the input of {extractor.name}"
        )
    chance = numpy_stream(0, Purpose.PATCH, index, number)
    top, left = (int(chance.integers(0, r + 1)) for r in room)
    return _tensor(extractor.prepare(np.ascontiguousarray(image[top : top + height, left : left + width])))


def _tensor(prepared: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(prepared.transpose(2, 0, 1)))


def _loaded(load: Callable[[int], torch.Tensor], count: int, how: Extraction) -> Iterator[torch.Tensor]:
    """Batches in order; threads prepare the next one meanwhile, since decoding and resizing release the lock."""
    indices = iter(range(count))
    with ThreadPoolExecutor(max(1, how.threads)) as pool:
        ahead = deque(pool.submit(load, i) for i in islice(indices, how.together + max(how.together, how.threads)))
        while ahead:
            batch = [ahead.popleft().result() for _ in range(min(how.together, len(ahead)))]
            ahead.extend(pool.submit(load, i) for i in islice(indices, len(batch)))
            yield torch.stack(batch)
