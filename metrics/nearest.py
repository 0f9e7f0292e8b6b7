"""The training images nearest to samples (Figures 13 to 15 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from data.pixels import to_float
from metrics.extractors import Extractor, RandomFeatures
from metrics.features import Extraction, cached_features, features
from metrics.images import ImageSet
from metrics.resize import clean_resize
from metrics.similarity import PairDistance

_BATCH = 32  # pairs compared at once


@dataclass(frozen=True)
class Neighbour:
    """One training image near a sample: in which view of the training set, which image, how far."""

    view: int
    index: int
    distance: float


def nearest(
    samples: ImageSet,
    training: Sequence[ImageSet],
    distance: PairDistance,
    extractor: Extractor,
    how: Extraction,
    *,
    count: int,
    shortlist: int,
) -> list[list[Neighbour]]:
    """The nearest training images of each sample, the nearest first.

    Comparing all pairs by a deep distance is out of reach for large sets; so the `shortlist` images nearest in the
    features of `extractor` are compared, and the order among these is exact.

    Args:
        samples: what to look for; all images are brought to the size of the first training image.
        training: views of one training set, the images and perhaps their mirror images; the nearest view counts.
        distance: of images (B, C, H, W) in [−1, 1].
        count: neighbours per sample.
        shortlist: candidates per sample and view, at least `count`.
    """
    wanted = features(samples, extractor, how, title="samples")  # first: damaged ones are refused before any are kept
    views = [cached_features(images, extractor, how, title="training images") for images in training]
    places = [(view, index) for view, found in enumerate(views) for index in range(len(found))]
    known = torch.cat(views)
    norms, candidates_of_each = known.square().sum(dim=1), min(shortlist * len(views), len(known))
    result = []
    for i, feature in enumerate(tqdm(wanted, "samples", disable=None)):
        squared = norms - 2 * known @ feature  # up to a constant
        candidates = [places[j] for j in squared.topk(candidates_of_each, largest=False).indices.tolist()]
        best: dict[int, Neighbour] = {}
        for neighbour in _ranked(samples[i], candidates, training, distance):
            best.setdefault(neighbour.index, neighbour)
        result.append(list(best.values())[:count])
    return result


def _ranked(
    sample: np.ndarray, candidates: list[tuple[int, int]], training: Sequence[ImageSet], distance: PairDistance
) -> list[Neighbour]:
    found, size = [], training[0][0].shape[:2]
    for start in range(0, len(candidates), _BATCH):
        batch = candidates[start : start + _BATCH]
        images = torch.stack([_values(training[view][index], size) for view, index in batch])
        distances = distance(_values(sample, size).expand_as(images), images)
        found += [Neighbour(*place, float(d)) for place, d in zip(batch, distances)]
    return sorted(found, key=lambda neighbour: neighbour.distance)


def _values(image: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Uint8 (H, W, C) as (C, h, w) in [−1, 1]."""
    resized = image if image.shape[:2] == tuple(size) else np.rint(clean_resize(image, size)).astype(np.uint8)
    return to_float(torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1))))


def nearest_rows(queries: torch.Tensor, blocks: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The distance of each of `queries` (N, D) to the nearest row of blocks (M, D), and the number of that, (N,)."""
    least, number, first = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.long), 0
    for block in blocks:
        found = torch.cdist(queries, block).argmin(dim=1)
        distance = (queries - block[found]).norm(dim=1)  # cdist is not exact where rows are nearly equal
        nearer = distance < least
        least, number = torch.where(nearer, distance, least), torch.where(nearer, first + found, number)
        first += len(block)
    return least, number


def pixel_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of (B, C, H, W), (B,)."""
    return (a - b).square().mean(dim=(1, 2, 3)).sqrt()


def random_features_distance(device: torch.device) -> PairDistance:
    """The form of LPIPS with a fixed random network: differences of unit-length feature vectors, over all levels.

    Finds copies; says little about what people see as alike.
    """
    maps = RandomFeatures().to(device)

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        levels = zip(maps(a.to(device)), maps(b.to(device)))
        unit = torch.nn.functional.normalize
        return sum((unit(x) - unit(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in levels).cpu()

    return distance
