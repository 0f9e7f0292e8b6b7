"""Samplers whose lattice grows, and the spectrum of the data that they need: methods of `InftyDiff`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from data.base import ImageDataset
from data.datasets import open_dataset
from data.pixels import as_values
from diffusion.coordinates import Size
from diffusion.mollifier import Mollifier
from diffusion.process import Denoiser, DiffusionProcess
from diffusion.progressive import progressive
from diffusion.samplers import SAMPLERS
from diffusion.spectrum import Spectrum, measure_spectrum
from infty_diff.sampling import SamplingOptions

if TYPE_CHECKING:
    from infty_diff.model import InftyDiff

log = logging.getLogger(__name__)
_IMAGES = 256  # of the training data, whose spectrum is measured
_TOGETHER = 32


def data_spectrum(model: InftyDiff) -> Spectrum:
    """The power spectrum of the training data: stored with the weights, or measured where the data are.

    Raises:
        ValueError: when there is neither, or the model has no mollifier.
    """
    if model.spectrum is None:
        try:
            # A few images are wanted: the whole set need not be decoded for them.
            data = open_dataset(replace(model.config.data, in_memory="never"), "train")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the weights have no spectrum of their data, and it cannot be measured: {error}; accepted: the data, "
                "for example with data.root_dir, or a sampler that needs no spectrum"
            ) from None
        model.spectrum = spectrum_of(data, model.process.mollifier)
    return model.spectrum


def spectrum_of(data: ImageDataset, mollifier: Mollifier) -> Spectrum:
    """The spectrum of the first images of a data set; ValueError as `measure_spectrum`."""
    groups = getattr(data, "groups", [range(len(data))])
    of_size = [group for group in groups if tuple(data[group[0]].shape[-2:]) == tuple(mollifier.train_size)]
    items = (of_size or groups)[0][:_IMAGES]
    chunks = (items[first : first + _TOGETHER] for first in range(0, len(items), _TOGETHER))
    return measure_spectrum((as_values(torch.stack([data[i] for i in chunk])) for chunk in chunks), mollifier)


def spectrum_facts(found: Callable[[], Spectrum]) -> dict[str, Any]:
    """What the header of weights says of the spectrum of their data; nothing where there is none.

    found: returns it, or raises ValueError.
    """
    try:
        return {"spectrum": asdict(found())}
    except ValueError as error:
        log.info("no spectrum for the sampler progressive is stored: %s", error)
        return {}


def spectrum_digest(spectrum: Spectrum) -> str:
    """SHA-256 of a spectrum, as hex."""
    return hashlib.sha256(repr(spectrum).encode()).hexdigest()


def stored_spectrum(header: Mapping[str, Any], file: object) -> Spectrum | None:
    """The spectrum in the header of weights, if it has one; ValueError naming the file where it is none."""
    known = header.get("spectrum")
    if known is None:
        return None
    try:
        return Spectrum(float(known["spacing"]), tuple(map(float, known["values"])), float(known["decay"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has no spectrum ({error!r}); accepted: weights as they were written") from None


def sampled_denoiser(
    model: InftyDiff, latents: torch.Tensor, size: Size, process: DiffusionProcess, options: SamplingOptions
) -> Denoiser:
    """The denoiser that a sampler of the options takes, for states (B, C, H, W) of a size."""
    denoise, delta = model.denoiser_at(latents, process, options.clip), SAMPLERS[options.sampler].delta
    return denoise if delta is None else progressive(denoise, process, data_spectrum(model), size, delta)
