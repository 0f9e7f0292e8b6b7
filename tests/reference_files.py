"""Files as the authors' code writes them, made of micro networks of ours, and the command that imports them."""

from pathlib import Path

import torch

import micro
from configs.schema import ImageConfig
from models.factory import build_denoiser, build_encoder, build_latent_model
from reference_networks import gradients_to_reference

SQUARE = {"data.img_width": 16, "train.ema_update_every": 10}
THEIRS = {"model.coordinate_convention": "reference", "model.encoder_block_norm": False}
COMMAND = "experiments/import_reference_checkpoint.py"


def named(network: torch.nn.Module, layout: str = "ts") -> dict[str, torch.Tensor]:
    """The parameters of a network under the authors' names: as gradients, which leave under them."""
    for parameter in network.parameters():
        parameter.grad = parameter.detach().clone()
    return gradients_to_reference(network, layout)


def checkpoint(step: int, model: dict, averaged: dict, encoder: dict | None = None) -> dict:
    """What the authors' training saves, with a small optimiser."""
    optimizer = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(2)}},
                 "param_groups": [{"lr": 5e-5, "betas": (0.9, 0.99), "params": [0]}]}  # fmt: skip
    encoders = {} if encoder is None else {"encoder_state_dict": encoder}
    return {"global_step": step, "model_state_dict": model, "model_ema_state_dict": averaged, **encoders,
            "optimizer_state_dict": optimizer}  # fmt: skip


def constants(config: ImageConfig) -> dict[str, torch.Tensor]:
    """What their networks store beside parameters."""
    k, u = config.model.kernel_size, config.model.uno_res
    return {"uno_coords": torch.zeros(1, u * u, 2), "normalising_conv.kernel": torch.full((k * k, 1, 1), k**-2.0)}


def write_theirs(root: Path) -> Path:
    """Micro networks of both stages under `root`, as the authors' code saves them, and what was saved."""
    image, latent = micro.image(root, {**SQUARE, **THEIRS}), micro.latent(root)
    torch.manual_seed(0)
    last, averaged = (build_denoiser(image.model, 3, image.size) for _ in range(2))
    encoder, prior = build_encoder(image.model, 3, image.size), build_latent_model(latent.model, 6)
    held, unused = constants(image), {"down_blocks.0.block.norm1.weight": torch.ones(8)}
    (root / "image").mkdir()
    (root / "latent").mkdir()
    state = checkpoint(
        20_000, {**held, **named(last)}, {**held, **named(averaged)}, {**held, **unused, **named(encoder)}
    )
    torch.save(state, root / "image" / "checkpoint.pkl")
    torch.save(checkpoint(500, named(prior), named(prior)), root / "latent" / "latent_checkpoint.pkl")
    std = torch.linspace(0.5, 2, 6)[None].half()
    torch.save((torch.randn(24, 6).half(), torch.randn(4, 6).half(), 0 * std, std), root / "latent" / "latents.pkl")
    networks = {"last": last, "averaged": averaged, "encoder": encoder, "prior": prior}
    torch.save({name: network.state_dict() for name, network in networks.items()}, root / "expected.pt")
    return root


def image_arguments(root: Path, source: Path, changes: dict | None = None) -> list[str]:
    fields = {**micro.IMAGE, **SQUARE, "run.root_dir": root, "run.experiment": "image", **(changes or {})}
    return ["--config", "configs/tiny_config.py", *micro.arguments("config", fields), f"--checkpoint={source}"]


def latent_arguments(root: Path, source: Path, changes: dict | None = None) -> list[str]:
    fields = {**micro.LATENT, "run.root_dir": root, "run.experiment": "sampler", **(changes or {})}
    given = micro.arguments("latent_config", fields)
    return ["--latent_config", "configs/tiny_latent_config.py", *given, f"--latent_checkpoint={source}"]
