"""All metrics of a set of samples against a reference set, as a report and as a table."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from diffusion.random import Purpose, stream
from metrics.extractors import Extractor
from metrics.features import Extraction, cached_features, features, patch
from metrics.frechet import frechet_distance, gaussian_of, kernel_distance
from metrics.images import ImageSet
from metrics.manifold import precision_recall
from metrics.resize import Size, by

SCORES = ("fid", "floor", "kid", "precision", "recall")  # what every table of a report gives
NEIGHBOURS = 3  # k of precision and recall, as published
_MANIFOLD_IMAGES = 50_000  # at most, of each set
_SIZES_SHOWN = 4  # of a mixed set


def evaluate(
    samples: ImageSet, reference: ImageSet, extractor: Extractor, how: Extraction, patches: int = 0
) -> dict[str, Any]:
    """Fréchet and kernel distance, precision and recall, and with `patches` the Fréchet distance of patches.

    The floor is the Fréchet distance of as many real images as there are samples, drawn at random from the reference,
    to the rest of it: what perfect samples would have. It needs a reference of twice as many images.

    Returns:
        A report of plain values: the metrics, what they were computed from and how, and warnings.
    Raises:
        ValueError: for fewer than two images on either side, or damaged ones.
    """
    for name, images in (("samples", samples), ("reference", reference)):
        if len(images) < 2:
            raise ValueError(f"{name} is {images.path}, which holds {len(images)} images; accepted: at least 2")
        if patches:
            patch(images, extractor, patches, 0)  # refuses small images now, not after an hour
    sizes = [tuple(images[0].shape[:2]) for images in (samples, reference)]
    mixed = {name: images.sizes() for name, images in (("samples", samples), ("reference images", reference))}
    real, made = _both(samples, reference, extractor, how)
    kid, kid_error = kernel_distance(real, made)
    report = {
        "metric": extractor.metric,
        "fid": frechet_distance(gaussian_of(real), gaussian_of(made)),
        "floor": _floor(real, len(made)),
        "kid": kid,
        "kid_standard_error": kid_error,
        **_precision_recall(real, made),
        "num_samples": len(samples),
        "num_reference": len(reference),
        "feature_dimension": real.shape[1],
        "extractor": extractor.identity(),
        "samples": {"path": samples.path, "size": sizes[0], "fingerprint": samples.fingerprint()},
        "reference": {"path": reference.path, "size": sizes[1], "fingerprint": reference.fingerprint()},
        "warnings": _mixed_sizes(mixed)
        + _warnings(len(samples), len(reference), real.shape[1], sizes, extractor, patches),
    }
    if patches:
        real, made = _both(samples, reference, extractor, how, patches)
        report |= {"patch_fid": frechet_distance(gaussian_of(real), gaussian_of(made)), "patches_per_image": patches}
    return report


def _both(
    samples: ImageSet, reference: ImageSet, extractor: Extractor, how: Extraction, patches: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the reference and of the samples, of these first: damaged ones are refused before any are kept."""
    what = "patches of " if patches else ""
    made = features(samples, extractor, how, patches=patches, title=f"{what}samples")
    real = cached_features(reference, extractor, how, patches=patches, title=f"{what}reference images")
    return real.to(how.device), made.to(how.device)


def _floor(real: torch.Tensor, count: int) -> float | None:
    """The Fréchet distance of `count` of the real features to the others, None where the others would be fewer."""
    if len(real) < 2 * count:
        return None
    order = torch.randperm(len(real), generator=stream(0, Purpose.FLOOR)).to(real.device)
    return frechet_distance(gaussian_of(real[order[count:]]), gaussian_of(real[order[:count]]))


def _precision_recall(real: torch.Tensor, made: torch.Tensor) -> dict[str, Any]:
    """Of equally many features from both sets, drawn at random from the larger, since both depend on the number."""
    count = min(len(real), len(made), _MANIFOLD_IMAGES)
    if count <= NEIGHBOURS:
        return {"precision": None, "recall": None, "precision_recall_images": count}
    generator = stream(0, Purpose.MANIFOLD)
    chosen = (x[torch.randperm(len(x), generator=generator)[:count]] if len(x) > count else x for x in (real, made))
    precision, recall = precision_recall(*chosen, k=NEIGHBOURS)
    return {"precision": precision, "recall": recall, "precision_recall_images": count}


def _mixed_sizes(counts: dict[str, Counter[Size]]) -> list[str]:
    """A line for each set whose images are not all of one size."""
    found = []
    for name, sizes in counts.items():
        if len(sizes) > 1:
            shown = ", ".join(f"{count} of {by(size)}" for size, count in sizes.most_common(_SIZES_SHOWN))
            more = f", and {len(sizes) - _SIZES_SHOWN} more sizes" if len(sizes) > _SIZES_SHOWN else ""
            found.append(f"{name} are of {len(sizes)} sizes, which are resized differently: {shown}{more}")
    return found


def _warnings(
    made: int, real: int, dimension: int, sizes: list[tuple[int, int]], extractor: Extractor, patches: int
) -> list[str]:
    found = []
    for count, what in ((made, "samples"), (real, "reference images")):
        if count <= dimension:
            found.append(
                f"{count} {what} for {dimension} feature dimensions: their covariance is singular and the Fréchet "
                "distance is too large; compare only with values of the same numbers"
            )
    if sizes[0] != sizes[1]:
        found.append(f"samples are {by(sizes[0])}, reference images {by(sizes[1])}")
    if not patches and min(a - b for a, b in zip(sizes[0], extractor.input_size)) > 0:
        found.append(
            f"samples of {by(sizes[0])} are reduced to {by(extractor.input_size)}, which hides their finest detail; "
            "the distance of patches measures it"
        )
    return found


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [(report["metric"], _shown(report["fid"]))]
    if "patch_fid" in report:
        rows.append((f"the same of patches, {report['patches_per_image']} an image", _shown(report["patch_fid"])))
    floor, count = report["floor"], report["num_samples"]
    needed = f"needs {2 * count} reference images"
    rows.append((f"its floor, that of {count} real images", needed if floor is None else _shown(floor)))
    error = report["kid_standard_error"]
    rows.append(("KID × 1000", f"{1000 * report['kid']:.4f}" + ("" if error is None else f" ± {1000 * error:.4f}")))
    for name in ("precision", "recall"):
        value = "needs more images" if report[name] is None else f"{report[name]:.4f}"
        rows.append((f"{name} (k = {NEIGHBOURS}, {report['precision_recall_images']} images)", value))
    for name, count in (("samples", report["num_samples"]), ("reference", report["num_reference"])):
        rows.append((name, f"{count} images of {by(report[name]['size'])}, {report[name]['path']}"))
    rows.append(("extractor", f"{report['extractor']['name']}, {report['feature_dimension']} dimensions"))
    rows.append(("resize", report["extractor"]["resize"]))
    if "protocol" in report:
        rows.append(("protocol", report["protocol"]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines + [f"warning: {text}" for text in report["warnings"]])


def _shown(distance: float) -> str:
    """Four digits, without the minus sign that rounding can leave of a distance of zero."""
    return f"{round(distance, 4) + 0.0:.4f}"
