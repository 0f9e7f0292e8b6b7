"""What benchmarks/recipe.py compares: settings that differ from a configuration, by name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from configs.validate import freeze
from runtime.overrides import load_config
from runtime.stored import flatten

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"


class Candidate(NamedTuple):
    """Overrides of both stages, FIELD=VALUE, and flags of sampling; `of` names another whose models are used."""

    what: str
    image: tuple[str, ...] = ()
    latent: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()
    of: str = ""


_TINY = (
    "diffusion.model_mean_type=mollified_epsilon", "train.batch_size=16", "optimizer.learning_rate=2e-3",
    "optimizer.warmup_steps=50", "train.ema_decay=0.99", "model.time_emb_dim=64", "model.num_conv_blocks=1",
    "model.uno_base_channels=32", "model.uno_mults=(1,2,2)", "model.uno_blocks_per_level=(1,1,1)",
    "model.uno_res=16", "model.uno_attn_resolutions=(8,4)", "model.encoder_texture=()",
)  # fmt: skip
_TWO = ("model.uno_blocks_per_level=(1,1)", "model.uno_attn_resolutions=(16,)", "model.uno_mults=(1,2)")
_COSINE = "optimizer.schedule=cosine"
_PAPER = (
    "diffusion.model_mean_type=mollified_epsilon", "diffusion.gaussian_filter_std=1.0", "diffusion.loss_weight=none",
    "mc_integral.ratio=0.25", "model.encoder_texture=()",
)  # fmt: skip


def _ablations() -> dict[str, Candidate]:
    """What configs/ablation_*_config.py change in configs/ffhq_128_config.py, changed in the paper's choices here."""
    base, found = _flat(_CONFIGS / "ffhq_128_config.py"), {}
    for file in sorted(_CONFIGS.glob("ablation_*_config.py")):
        changed = {k: v for k, v in _flat(file).items() if v != base[k] and k != "run.experiment"}
        changes = tuple(f"{field}={value}" for field, value in changed.items())
        name = file.stem.removesuffix("_config")
        found[name] = Candidate(f"the paper's choices but {' '.join(changes)}", (*_PAPER, *changes))
    return found


def _flat(file: Path) -> dict[str, object]:
    return flatten(asdict(freeze(load_config(str(file)))))


CANDIDATES = {
    "config": Candidate("the configuration as it is"),
    "tiny": Candidate("networks of configs/tiny_config.py that predict the mollified noise", _TINY),
    "tiny_filter": Candidate("these, with a weaker filter", sampling=("--inv_snr=0.3",), of="tiny"),
    "tiny_xstart": Candidate("these, predicting x_0", (*_TINY, "diffusion.model_mean_type=xstart")),
    "tiny_xstart_32": Candidate(
        "these, with batches of 32", (*_TINY, "diffusion.model_mean_type=xstart", "train.batch_size=32")
    ),
    "mollified": Candidate("predicts the mollified noise", ("diffusion.model_mean_type=mollified_epsilon",)),
    "mollified_filter": Candidate("this, with a weaker filter", sampling=("--inv_snr=0.3",), of="mollified"),
    "v": Candidate("predicts v", ("diffusion.model_mean_type=v",)),
    "rate_5e-4": Candidate("half the learning rate", ("optimizer.learning_rate=5e-4",)),
    "rate_2e-3": Candidate("twice the learning rate", ("optimizer.learning_rate=2e-3",)),
    "cosine": Candidate("the rate falls to 0", (_COSINE,), (_COSINE,)),
    "cosine_2e-3": Candidate("twice the rate, falling to 0", (_COSINE, "optimizer.learning_rate=2e-3"), (_COSINE,)),
    "no_weights": Candidate("no weights of the loss", ("diffusion.loss_weight=none",)),
    "batch_16": Candidate("batches of 16", ("train.batch_size=16",)),
    "batch_64": Candidate("batches of 64", ("train.batch_size=64",)),
    "blocks_1": Candidate("one sparse block each way", ("model.num_conv_blocks=1",)),
    "unet_24": Candidate("a narrower U-Net, more steps", ("model.uno_base_channels=24",)),
    "unet_48": Candidate("a wider U-Net, fewer steps", ("model.uno_base_channels=48",)),
    "unet_48_2": Candidate("a wider U-Net of two levels", ("model.uno_base_channels=48", *_TWO)),
    "unet_32_2": Candidate("a U-Net of two levels", _TWO),
    "grid_16": Candidate("a U-Net on a grid of 16×16", ("model.uno_res=16", "model.uno_attn_resolutions=(4,)")),
    "no_texture": Candidate("an encoder that does not measure texture", ("model.encoder_texture=()",)),
    "nf_24": Candidate("fewer channels at the points", ("model.nf=24",)),
    "nf_48": Candidate("more channels at the points", ("model.nf=48",)),
    "ratio_4": Candidate("a quarter of the points seen", ("mc_integral.ratio=0.25",)),
    "ratio_1": Candidate("all points seen", ("mc_integral.ratio=1.0",)),
    "sigma_1": Candidate("mollifier of one pixel", ("diffusion.gaussian_filter_std=1.0",)),
    "ema_99": Candidate("a short EMA of weights", ("train.ema_decay=0.99",)),
    "ema_9995": Candidate("a long EMA of weights", ("train.ema_decay=0.9995",)),
    "latent_256": Candidate("a latent four times as large", ("model.z_dim=256",)),
    "white_noise": Candidate("white noise, no mollifier", ("diffusion.gaussian_filter_std=0.0",)),
    "reference": Candidate("the published coordinates", ("model.coordinate_convention=reference",)),
    "paper": Candidate("prediction, mollifier, points, loss and encoder of the paper", _PAPER),
    **_ablations(),
}  # fmt: skip
