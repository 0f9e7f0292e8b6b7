"""The filter that was calibrated for weights: a small JSON file beside them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from data.base import digest
from data.opening import read_json
from diffusion.mollifier import InverseSnr, Mollifier
from runtime.files import file_digest, plain, write_json

log = logging.getLogger(__name__)
CALIBRATED = "calibrated"
_CHECKSUM = "sha256"  # of the rest of the file
_LEAST, _MOST = 1e-6, 1e6  # below, the filter amplifies rounding to white noise; above, it leaves no image

_OTHER = {"weights_sha256": "other weights", "mollifier": "another mollifier"}


def parse_inv_snr(given: float | str) -> float | str:
    """A number above 0 and within reason, or "calibrated".

    Raises:
        ValueError: for anything else.
    """
    try:
        number = given if given == CALIBRATED else float(given)
    except ValueError:
        number = math.nan
    if number != CALIBRATED and not _LEAST <= number <= _MOST:
        raise ValueError(f"inv_snr is {given}; accepted: a number from {_LEAST:g} to {_MOST:g}, or {CALIBRATED}")
    return number


def filter_path(weights: Path) -> Path:
    """`weights.safetensors` -> `weights.filter.json`."""
    return weights.with_suffix(".filter.json")


def save_filter(weights: Path, mollifier: Mollifier, ratios: InverseSnr, facts: dict[str, Any]) -> Path:
    """Write the ratios atomically beside the weights they belong to, with facts about how they were found."""
    path = filter_path(weights)
    content = plain({**facts, **_key(weights, mollifier), "spacing": ratios.spacing, "inv_snr": ratios.values})
    write_json(path, {**content, _CHECKSUM: digest(content, [])})
    return path


def load_filter(weights: Path, mollifier: Mollifier) -> InverseSnr:
    """The ratios calibrated for a file of weights.

    Raises:
        ValueError: when there are none, they cannot be read, or belong to other weights or another mollifier.
    """
    path, advice = filter_path(weights), "accepted: a number, or experiments/calibrate_filter.py before"
    if not path.exists():
        raise ValueError(f"inv_snr is calibrated, but {path} is not there; {advice}")
    try:
        stored = read_json(path, dict, "a calibrated filter")
        if _CHECKSUM in stored and stored.pop(_CHECKSUM) != digest(stored, []):
            raise ValueError("its checksum is another")
        ratios = InverseSnr(float(stored["spacing"]), tuple(map(float, stored["inv_snr"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"inv_snr is calibrated, but {path} is no calibrated filter ({error!r}); {advice}") from None
    for name, value in _key(weights, mollifier).items():
        if stored.get(name) != value:
            raise ValueError(f"inv_snr is calibrated, but {path} was made for {_OTHER[name]}; {advice} again")
    return ratios


def stored_filter(weights: Path, mollifier: Mollifier) -> tuple[InverseSnr, dict[str, Any]] | None:
    """The ratios and the facts stored for a file of weights, for `save_filter`; None, with a warning, if of no use."""
    if not filter_path(weights).exists():
        return None
    try:
        ratios = load_filter(weights, mollifier)
    except ValueError as error:
        log.warning("%s; it is not copied", error)
        return None
    stored = read_json(filter_path(weights), dict, "a calibrated filter")
    return ratios, {name: value for name, value in stored.items() if name != _CHECKSUM}


def _key(weights: Path, mollifier: Mollifier) -> dict[str, Any]:
    return {
        "weights_sha256": file_digest(weights),
        "mollifier": {"sigma": mollifier.sigma, "train_size": list(mollifier.train_size)},
    }
