"""The smallest configurations that still have every part: shared by the tests of training, sampling and commands."""

from dataclasses import asdict
from pathlib import Path

import torch
from ml_collections import ConfigDict

from configs.defaults import image_config, latent_config
from configs.schema import ImageConfig, LatentConfig
from configs.validate import freeze
from models.factory import build_denoiser, build_encoder, build_latent_model
from runtime.stored import WEIGHTS, run_path
from runtime.weights import save_weights

IMAGE = {
    "data.name": "functions", "data.img_size": 16, "data.img_width": 12, "data.num_images": 24,
    "train.steps": 6, "train.batch_size": 4, "train.plot_graph_steps": 1, "train.plot_samples_steps": 6,
    "train.checkpoint_steps": 3, "train.plot_sampling_steps": "3", "train.sample_size": 2, "train.ema_update_every": 1,
    "train.val_loss_steps": 2,
    "model.nf": 8, "model.time_emb_dim": 8, "model.num_conv_blocks": 1, "model.kernel_size": 3, "model.uno_res": 8,
    "model.uno_base_channels": 8, "model.uno_mults": (1, 2), "model.uno_blocks_per_level": (1, 1),
    "model.uno_attn_resolutions": (4,), "model.uno_dropout_from_resolution": 4, "model.z_dim": 6,
    "diffusion.multiscale_max_img_size": 8, "optimizer.learning_rate": 1e-3,
}  # fmt: skip
LATENT = {
    "data.fid_samples": 3, "train.steps": 6, "train.batch_size": 8, "train.plot_graph_steps": 1,
    "train.plot_samples_steps": 6, "train.checkpoint_steps": 3, "train.plot_sampling_steps": "3",
    "train.sample_size": 2, "train.calculate_test_loss_steps": 2, "train.test_loss_repeats": 2,
    "train.ema_update_every": 1,
    "model.hid_channels": 16, "model.num_layers": 3, "model.time_embed_dim": 8, "diffusion.steps": 100,
    "diffusion.noise_schedule": "linear",
}  # fmt: skip


def overrides(root: Path, fields: dict, changes: dict | None = None) -> dict:
    """Fields of a micro run kept under `root`, with changes."""
    return {**fields, "run.root_dir": str(root), "run.device": "cpu", **(changes or {})}


def arguments(name: str, fields: dict) -> list[str]:
    """The fields as command-line overrides of the configuration flag `name`."""
    return [f"--{name}.{path}={value}" for path, value in fields.items()]


def _built(config: ConfigDict, fields: dict) -> ConfigDict:
    for path, value in fields.items():
        section, key = path.split(".")
        config[section][key] = value
    return config


def image(root: Path, changes: dict | None = None) -> ImageConfig:
    """A frozen stage-one configuration of 16x12 functions."""
    return freeze(_built(image_config(), overrides(root, IMAGE, {"run.experiment": "micro", **(changes or {})})))


def latent(root: Path, changes: dict | None = None) -> LatentConfig:
    """A frozen stage-two configuration for it."""
    fields = overrides(root, LATENT, {"run.experiment": "micro_sampler", **(changes or {})})
    return freeze(_built(latent_config(), fields), LatentConfig)


def networks(config: ImageConfig) -> dict[str, torch.nn.Module]:
    """Encoder and denoiser, untrained, from one seed."""
    torch.manual_seed(0)
    parts = {"encoder": build_encoder, "denoiser": build_denoiser}
    return {name: build(config.model, config.data.channels, config.size) for name, build in parts.items()}


def write_run(config: ImageConfig) -> Path:
    """The weights of `networks` as those of the run; returns its folder."""
    parts = networks(config).items()
    tensors = {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}
    save_weights(run_path(config) / WEIGHTS, tensors, {"step": 0, "config": asdict(config)})
    return run_path(config)


def write_prior(config: LatentConfig, z_dim: int = 6) -> Path:
    """The weights of an untrained latent model as those of the run; returns its folder."""
    torch.manual_seed(0)
    prior = build_latent_model(config.model, z_dim).state_dict()
    tensors = {f"latent_model.{key}": value for key, value in prior.items()}
    tensors |= {"mean": torch.zeros(z_dim), "std": torch.ones(z_dim)}
    save_weights(run_path(config) / WEIGHTS, tensors, {"step": 0, "config": asdict(config)})
    return run_path(config)
