"""How a model is read from files and written to them: methods of `InftyDiff`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from configs.schema import ImageConfig, LatentConfig
from data.units import FieldUnits
from diffusion.factory import build_image_process
from diffusion.mollifier import InverseSnr
from diffusion.samplers import SAMPLERS
from infty_diff.filter_file import CALIBRATED, filter_path, load_filter, save_filter, stored_filter
from infty_diff.growing import data_spectrum, spectrum_digest, spectrum_facts, stored_spectrum
from infty_diff.latent_prior import LatentPrior
from infty_diff.sampling import SamplingOptions, stored_sampling
from infty_diff.stage_files import load_stage, save_stages
from models.factory import build_denoiser, build_encoder, for_evaluation
from runtime.files import file_digest
from runtime.precision import Precision, pick_device
from runtime.saved import IMAGE, LATENT, resolve
from runtime.weights import load_networks, save_weights

if TYPE_CHECKING:
    from infty_diff.model import InftyDiff


def from_runs(
    cls: type[InftyDiff],
    image_run: str | Path,
    latent_run: str | Path | None = None,
    device: str | int | torch.device = "auto",
    given: ImageConfig | None = None,
    latent_given: LatentConfig | None = None,
    weights: str = "newest",
    latent_weights: str = "newest",
) -> InftyDiff:
    """Load averaged weights: of a stage-one run, and of a stage-two run if samples are wanted.

    Args:
        image_run, latent_run: a run's folder, a file of weights, a folder that `save` wrote, or the name of a model in
            weights/ (`runtime.saved.resolve`). The last two hold both stages: they need no `latent_run`.
        device: "auto", or what `torch.device` takes, of a CPU or a CUDA device.
        given, latent_given: in place of the stored configurations, the same but for what does not shape what was
            trained (`runtime.stored.relocate`), as a `Command` hands them on: the back end, where data are.
        weights, latent_weights: of each run, "newest" or "best", those with the least loss on held-out data.
    Raises:
        ValueError: when there are no such weights, or the latents of the two runs differ in size.
    """
    if latent_run is None and latent_weights != "newest":
        raise ValueError(f"latent_weights is {latent_weights!r}; accepted: newest, or a latent_run that they are of")
    where, found = pick_device(device), resolve(image_run, weights)
    files, found_image = {"image": found.image}, found.image
    config, tensors, header = load_stage(found.image, ImageConfig, given)
    networks = {
        "encoder": build_encoder(config.model, config.data.channels, config.size),
        "denoiser": build_denoiser(config.model, config.data.channels, config.size),
    }
    load_networks(networks, tensors, str(found.image))
    for network in networks.values():
        for_evaluation(network).to(where)
    prior, headers = None, {"image": header}
    if latent_run is not None:
        found = resolve(latent_run, latent_weights)
    latent_file = found.latent or (None if latent_run is None else found.image)
    if latent_file is not None:
        files["latent"] = latent_file
        latent_config, tensors, headers["latent"] = load_stage(latent_file, LatentConfig, latent_given)
        prior = LatentPrior.from_tensors(latent_config, tensors, where, str(latent_file))
        if prior.dim != config.model.z_dim:
            raise ValueError(
                f"{latent_file} draws latents of size {prior.dim}; {image_run} decodes model.z_dim={config.model.z_dim}"
            )
    precision = Precision.create(where, config.train.amp, config.train.amp_dtype)
    sampling = stored_sampling(files["image"], header)
    trained = {stage: known["step"] for stage, known in headers.items() if "step" in known}
    known = (
        precision,
        sampling,
        trained,
        files,
        stored_spectrum(header, found_image),
        FieldUnits.stored(header, found_image),
    )
    return cls(config, networks["encoder"], networks["denoiser"], prior, *known)


def save(model: InftyDiff, folder: str | Path, *, half: bool = False) -> Path:
    """Write a folder that `from_runs` loads: weights, configurations, `sampling`, and filter and spectrum if any.

    Args:
        folder: a new or an empty one; it appears whole or not at all.
        half: round weights to float16, for half the size. Without it they load back bit for bit.
    Raises:
        ValueError: when the folder holds something, or `sampling` asks for a calibrated filter and there is none.
    """
    inverse_snr(model, model.sampling.inv_snr)
    modules = {"encoder": model.encoder, "denoiser": model.denoiser}
    tensors = {f"{name}.{key}": v for name, module in modules.items() for key, v in module.state_dict().items()}
    steps = {stage: {"step": step} for stage, step in model.trained.items()}
    facts = {"sampling": asdict(model.sampling), **spectrum_facts(partial(data_spectrum, model))}
    if model.units is not None:
        facts["units"] = asdict(model.units)
    stages = {IMAGE: (model.config, tensors, {**facts, **steps.get("image", {})})}
    if model.prior is not None:
        stages[LATENT] = (model.prior.config, model.prior.to_tensors(), steps.get("latent", {}))

    def add_filter(temporary: Path) -> None:
        if "image" in model.files:
            found = stored_filter(model.files["image"], model.process.mollifier)
            if found is not None:
                save_filter(temporary / IMAGE, model.process.mollifier, *found)

    return save_stages(folder, stages, half, add_filter)


def store_sampling(file: Path, sampling: SamplingOptions) -> None:
    """Make options those that a saved model samples with where none are given.

    Args:
        file: its weights of stage one; tensors and calibrated filter are kept.
        sampling: the options.
    Raises:
        ValueError: when the file is damaged, or the options ask for a calibrated filter and there is none.
    """
    config, tensors, header = load_stage(file, ImageConfig)
    mollifier = build_image_process(config).mollifier
    if sampling.inv_snr == CALIBRATED:
        load_filter(file, mollifier)
    kept = stored_filter(file, mollifier)
    save_weights(file, tensors, {**header, "sampling": asdict(sampling)})
    if kept is not None:  # it belongs to a file of weights
        save_filter(file, mollifier, *kept)


def provenance(model: InftyDiff, options: SamplingOptions) -> dict[str, str]:
    """What identifies the model in a folder of results: name and SHA-256 of its files, and what else is used of it.

    Raises:
        ValueError: when the options ask for a calibrated filter, or a spectrum of the data, and there is none.
    """
    inverse_snr(model, options.inv_snr)
    known = {f"{stage}_run": file_digest(path) for stage, path in model.files.items()}
    known |= {f"{stage}_run_weights": path.name for stage, path in model.files.items()}
    if SAMPLERS[options.sampler].grows:
        known["spectrum"] = spectrum_digest(data_spectrum(model))
    if options.inv_snr == CALIBRATED:
        known["filter"] = file_digest(filter_path(model.files["image"]))
    return known


def inverse_snr(model: InftyDiff, inv_snr: float | str) -> float | InverseSnr:
    """What `SamplingOptions.inv_snr` stands for.

    Raises:
        ValueError: when it is "calibrated", and no filter calibrated for the weights is stored with them.
    """
    if inv_snr != CALIBRATED:
        return inv_snr
    if model.calibrated is None:
        if "image" not in model.files:
            raise ValueError(f"inv_snr is {CALIBRATED}; accepted: a number, or a model that was loaded from files")
        model.calibrated = load_filter(model.files["image"], model.process.mollifier)
    return model.calibrated
