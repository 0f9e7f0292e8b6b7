"""What a training run is made from, checked as a whole before anything is written: by a run, and by a dry run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from configs.schema import ImageConfig, LatentConfig
from configs.validate import ConfigError, one_line
from data.base import ImageDataset
from data.datasets import open_dataset
from diffusion.factory import build_image_process, build_latent_process
from infty_diff.model import InftyDiff
from models.factory import build_denoiser, build_encoder, build_latent_model
from runtime.lock import FolderLock
from runtime.precision import Precision, pick_device
from runtime.processes import Processes
from runtime.run_dir import RunDir
from runtime.shared_memory import one_per_machine
from runtime.stored import run_path
from training.init_from import fitting_weights
from training.parallel import part_size


@dataclass
class ImageRun:
    """What stage one trains with."""

    config: ImageConfig
    processes: Processes
    precision: Precision
    run_dir: RunDir
    train_set: ImageDataset
    val_set: ImageDataset | None


@dataclass
class LatentRun:
    """What stage two trains with. images: those whose latents it learns."""

    config: LatentConfig
    processes: Processes
    precision: Precision
    run_dir: RunDir
    decoder: InftyDiff
    images: ImageDataset


def prepare_image_run(configs: dict[str, ImageConfig], processes: Processes) -> ImageRun:
    """Open what `config` names, and build its networks on the meta device.

    Raises:
        ConfigError: with one line for each fault.
    """
    config, faults = configs["config"], _Faults()
    model, channels, size = config.model, config.data.channels, config.size
    modules: dict[str, nn.Module] = {}
    precision, run_dir = _common(config, processes, faults)
    with faults.noted(), torch.device("meta"):
        modules["denoiser"] = build_denoiser(model, channels, size)
    with faults.noted(), torch.device("meta"):
        modules["encoder"] = build_encoder(model, channels, size)
    with faults.noted():
        if model.attention == "flash_attn" and precision is not None and precision.dtype is None:
            raise ValueError("model.attention is 'flash_attn'; accepted: sdpa, or train.amp=true on a GPU")
    with faults.noted():
        process = build_image_process(config)
        with faults.noted("train.plot_sampling_steps: "):
            process.respaced(config.train.plot_sampling_steps)
    train_set, val_set = None, None
    with faults.noted():
        keep = one_per_machine(processes)
        train_set = open_dataset(config.data, "train", keep)
        val_set = open_dataset(config.data, "val", keep) if config.data.val_ratio else None
        for data in filter(None, (train_set, val_set)):
            least = min(getattr(data, "least_known", {}).values(), default=model.knn_neighbours)
            if least < model.knn_neighbours:
                raise ValueError(
                    f"data.root_dir: a field has {least} known points; accepted: model.knn_neighbours, "
                    f"{model.knn_neighbours}, at least"
                )
    _start(config, run_dir, modules, 2, faults)
    faults.tell()
    assert precision is not None and run_dir is not None and train_set is not None
    return ImageRun(config, processes, precision, run_dir, train_set, val_set)


def prepare_latent_run(
    configs: dict[str, ImageConfig | LatentConfig], processes: Processes, weights: str = "newest"
) -> LatentRun:
    """Load the autoencoder that `decoder_config` names, open its images, and build the network on the meta device.

    weights: of the autoencoder, "newest" or "best".

    Raises:
        ConfigError: with one line for each fault.
    """
    config, given, faults = configs["config"], configs["decoder_config"], _Faults()
    assert isinstance(config, LatentConfig) and isinstance(given, ImageConfig)
    modules: dict[str, nn.Module] = {}
    precision, run_dir = _common(config, processes, faults)
    decoder, images = None, None
    with faults.noted():
        build_latent_process(config)
    with faults.noted():
        device = "cpu" if precision is None else config.run.device
        decoder = InftyDiff.from_runs(run_path(given), device=device, given=given, weights=weights)
    with faults.noted(), torch.device("meta"):
        modules["latent_model"] = build_latent_model(config.model, given.model.z_dim)
    if decoder is not None:
        with faults.noted("train.plot_sampling_steps: "):
            decoder.process.respaced(config.train.plot_sampling_steps)
    with faults.noted():
        images = open_dataset(given.data, "train", one_per_machine(processes))
    _start(config, run_dir, modules, 1, faults)
    faults.tell()
    assert precision is not None and run_dir is not None and decoder is not None and images is not None
    return LatentRun(config, processes, precision, run_dir, decoder, images)


class _Faults:
    """Faults found so far."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    @contextlib.contextmanager
    def noted(self, prefix: str = "") -> Iterator[None]:
        """Keep the fault that ends the block, and go on after it."""
        try:
            yield
        except ConfigError as error:
            self._lines += error.faults
        except (ValueError, OSError) as error:
            self._lines.append(prefix + one_line(error))

    def tell(self) -> None:
        """Raise ConfigError if there are any, each once."""
        if self._lines:
            raise ConfigError(list(dict.fromkeys(self._lines)))


def _common(
    config: ImageConfig | LatentConfig, processes: Processes, faults: _Faults
) -> tuple[Precision | None, RunDir | None]:
    precision, run_dir = None, None
    with faults.noted("run."):
        precision = Precision.create(pick_device(config.run.device), config.train.amp, config.train.amp_dtype)
    with faults.noted():
        run_dir = RunDir(config, resume=config.train.load_checkpoint)
    with faults.noted():
        if processes.is_rank_0:
            FolderLock(run_path(config)).check()
    with faults.noted():
        part_size(config.train, processes)
    return precision, run_dir


def _start(
    config: ImageConfig | LatentConfig,
    run_dir: RunDir | None,
    modules: dict[str, nn.Module],
    count: int,
    faults: _Faults,
) -> None:
    """Whether the networks, if all of them could be built, can start from the run that train.init_from names."""
    if config.train.init_from and len(modules) == count and run_dir is not None and not run_dir.begun:
        with faults.noted():
            fitting_weights(config.train.init_from, modules)
