"""Every configuration field of the project: its type, default, accepted values and meaning.

This table is the one place that states a default. `configs/defaults.py` turns it into `ConfigDict`s,
`configs/validate.py` checks those against it and returns the frozen dataclasses below, which is what
the rest of the code receives. Field names are those of the authors' configurations.
"""

from dataclasses import dataclass, field
from typing import Any

SCHEDULES = ("cosine", "linear", "shifted_cosine", "const<beta>")
PREDICTIONS = ("mollified_epsilon", "epsilon", "xstart", "v")
RATE_SCHEDULES = ("constant", "cosine", "inverse_sqrt")
LOSS_WEIGHTS = ("none", "min_snr")


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
    derived: str | None = None,
    shapes: bool = False,
    items: type = int,
) -> Any:
    """Declare one field: default, one-line meaning, and accepted values (choices, or bounds included).

    `derived` is the rule shown in the help of a field whose default follows from other fields. `shapes` says that
    networks, process or data, or what is minimised, would be others with another value: it cannot change when a run is
    continued or used, where all other fields can. `items` is the type of the entries of a tuple, all above 0.
    """
    rule = {"doc": doc, "choices": choices, "low": low, "high": high, "derived": derived, "shapes": shapes}
    return field(default=default, metadata={**rule, "items": items})


@dataclass(frozen=True)
class RunConfig:
    name: str = option("infty_diff", "project name shown by wandb")
    experiment: str = option("experiment", "name of the run: its folder under run.root_dir")
    root_dir: str = option("checkpoints", "folder in which runs are kept")
    seed: int = option(0, "seed of initialisation, data order, coordinates and noise", low=0, shapes=True)
    device: str = option("auto", "device to run on", choices=("auto", "cpu", "cuda"))
    wandb_mode: str = option("disabled", "Weights & Biases logging", choices=("disabled", "offline", "online"))
    wandb_dir: str = option("", "folder for wandb files; empty = the run folder")


@dataclass(frozen=True)
class DataConfig:
    name: str = option(
        "functions",
        "kind of data",
        choices=("functions", "folder", "ffhq", "fashion_mnist", "celeba", "churches"),
        shapes=True,
    )
    root_dir: str = option("", "folder, zip, LMDB or .npz of the images; unused for procedural functions")
    img_size: int = option(256, "height of the training lattice in pixels", low=4, shapes=True)
    img_width: int = option(256, "width of the training lattice in pixels", low=4, derived="data.img_size", shapes=True)
    channels: int = option(3, "image channels", choices=(1, 3, 4), shapes=True)
    random_flip: bool = option(True, "mirror training images at random")
    split: str = option(
        "published",
        "training and validation images: as published, else by a hash of the names; authors = for ffhq, the first "
        "1 - val_ratio of the sorted names are for training",
        choices=("published", "authors"),
        shapes=True,
    )
    val_ratio: float = option(0.05, "part held out where no published split exists", low=0.0, high=0.9, shapes=True)
    on_error: str = option("raise", "what to do with a corrupt or too small image", choices=("raise", "skip"))
    in_memory: str = option("auto", "keep decoded images in memory", choices=("auto", "always", "never"))
    memory_gb: float = option(8.0, "largest decoded data set kept in memory when in_memory=auto", low=0.0)
    num_workers: int = option(4, "decoding processes when images are not kept in memory", low=0)
    num_images: int = option(4096, "number of procedural functions", low=1, shapes=True)
    seed: int = option(0, "seed of the procedural functions", low=0, shapes=True)
    fid_samples: int = option(50000, "number of samples for FID", low=1)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(1_000_000, "total optimiser steps", low=1)
    batch_size: int = option(32, "images per step, over all processes", low=1)
    amp: bool = option(True, "mixed precision on a GPU (always off on a CPU); False = float32 throughout, without TF32")
    amp_dtype: str = option(
        "auto",
        "bfloat16 where the hardware has it, else float16 with loss scaling",
        choices=("auto", "bfloat16", "float16"),
    )
    load_checkpoint: bool = option(True, "continue the newest checkpoint of the run if there is one")
    plot_graph_steps: int = option(100, "steps between log lines", low=1)
    plot_samples_steps: int = option(5000, "steps between sample pictures", low=1)
    checkpoint_steps: int = option(10000, "steps between checkpoints", low=1)
    keep_checkpoints: int = option(2, "newest checkpoints kept on disk", low=1)
    sample_size: int = option(8, "images in a sample picture", low=1)
    plot_sampling_steps: str = option("100", "step subset used for sample pictures")
    ema_update_every: int = option(10, "steps between updates of the averaged weights", low=1)
    ema_decay: float = option(0.995, "decay of the averaged weights", low=0.0, high=1.0)
    ema_lengths: tuple = option(
        (),
        "relative standard deviations of power-function averages, e.g. (0.05, 0.10), kept beside the usual one; from "
        "them experiments/choose_average.py makes averages of other lengths",
        items=float,
    )
    ema_snapshot_steps: int = option(
        10000, "steps between files of these averages", low=1, derived="train.checkpoint_steps"
    )
    ema_snapshots: int = option(
        64,
        "most such files; past it every second one goes. Each takes 2 bytes, in float32 4, per parameter and length",
        low=4,
    )
    ema_snapshot_dtype: str = option("float16", "precision of these files", choices=("float16", "float32"))
    gradient_clip: float = option(1.0, "largest gradient norm per network; 0 = no clipping", low=0.0)
    compile: str = option(
        "auto",
        "torch.compile of the dense part of each network, by mode; reduce-overhead = CUDA graphs; auto = on a GPU",
        choices=("auto", "off", "default", "reduce-overhead", "max-autotune"),
    )
    recompute: bool = option(False, "keep no activations inside residual blocks: less memory, a third more arithmetic")
    init_from: str = option("", "folder of a run whose averaged weights a new run starts from", shapes=True)


@dataclass(frozen=True)
class ImageTrainConfig(TrainConfig):
    val_loss_steps: int = option(5000, "steps between losses on held-out images; 0 = never", low=0)
    val_images: int = option(512, "held-out images, at most, of which the loss is computed", low=1)


@dataclass(frozen=True)
class LatentTrainConfig(TrainConfig):
    batch_size: int = option(256, "latents per step, over all processes", low=1)
    plot_samples_steps: int = option(20000, "steps between sample pictures", low=1)
    calculate_test_loss_steps: int = option(10000, "steps between evaluations on held-out latents", low=1)
    test_loss_repeats: int = option(10, "noise draws per held-out latent in an evaluation", low=1)


@dataclass(frozen=True)
class ModelConfig:
    nf: int = option(64, "channels of the sparse level", low=1, shapes=True)
    time_emb_dim: int = option(256, "width of the time embedding", low=4, shapes=True)
    num_conv_blocks: int = option(3, "sparse blocks on the way in, and on the way out", low=1, shapes=True)
    downsampling: str = option(
        "grid",
        "from points to the nodes of the U-Net: interpolation to a grid, or subsets of the points (Table 2)",
        choices=("grid", "random", "equidistant"),
        shapes=True,
    )
    knn_neighbours: int = option(3, "points averaged into a grid cell", low=1, shapes=True)
    depthwise_sparse: bool = option(True, "depthwise (True) or full (False) sparse convolutions", shapes=True)
    kernel_size: int = option(7, "side of the sparse kernel at the training size; odd", low=1, shapes=True)
    kernel: str = option(
        "linear",
        "sparse kernel: weights; conv, activation, conv (Table 2); or a network of the offset",
        choices=("linear", "nonlinear", "continuous"),
        shapes=True,
    )
    backend: str = option("auto", "sparse operator back end; auto = the fastest of native, torch_dense")
    tile_points: int = option(
        4194304,
        "points of an image whose features are held at once when sampling; larger images go tile by tile, which takes "
        "more time; 0 = all",
        low=0,
    )
    uno_res: int = option(128, "side of the grid of the inner U-Net", low=1, shapes=True)
    uno_base_channels: int = option(128, "channels of the finest U-Net level", low=1, shapes=True)
    uno_mults: tuple = option((1, 2, 4, 8, 8), "channel multiplier of each U-Net level", shapes=True)
    uno_blocks_per_level: tuple = option((2, 2, 2, 2, 2), "residual blocks of each U-Net level", shapes=True)
    uno_attn_resolutions: tuple = option((16, 8), "U-Net resolutions with attention", shapes=True)
    uno_dropout_from_resolution: int = option(16, "dropout at this U-Net resolution and below", low=0, shapes=True)
    uno_dropout: float = option(0.1, "dropout rate", low=0.0, high=0.99, shapes=True)
    uno_conv_type: str = option("conv", "U-Net convolutions", choices=("conv", "spectral"), shapes=True)
    z_dim: int = option(1024, "size of the latent", low=1, shapes=True)
    learn_sigma: bool = option(False, "predict the reverse variance too", shapes=True)
    sigma_small: bool = option(False, "fixed reverse variance: posterior (True) or beta (False)", shapes=True)
    stochastic_encoding: bool = option(False, "encoder returns a distribution instead of a vector", shapes=True)
    kld_weight: float = option(1e-4, "weight of the KL term of a stochastic encoder", low=0.0, shapes=True)
    coordinate_convention: str = option(
        "cell_centred",
        "where pixel i of n sits, and how networks go between lattices; reference = the authors' code",
        choices=("cell_centred", "reference", "corner_aligned"),
        shapes=True,
    )
    encoder_block_norm: bool = option(
        True, "norms in the encoder's sparse blocks; False = the authors' encoder", shapes=True
    )
    attention: str = option("sdpa", "attention kernels", choices=("sdpa", "flash_attn"))


@dataclass(frozen=True)
class LatentModelConfig:
    hid_channels: int = option(2048, "hidden width", low=1, shapes=True)
    num_layers: int = option(10, "layers", low=2, shapes=True)
    time_embed_dim: int = option(128, "width of the time features", low=4, shapes=True)
    dropout: float = option(0.0, "dropout rate", low=0.0, high=0.99, shapes=True)
    learn_sigma: bool = option(False, "predict the reverse variance too", shapes=True)
    sigma_small: bool = option(False, "fixed reverse variance: posterior (True) or beta (False)", shapes=True)


@dataclass(frozen=True)
class DiffusionConfig:
    steps: int = option(1000, "diffusion steps", low=2, shapes=True)
    noise_schedule: str = option("cosine", f"one of {', '.join(SCHEDULES)}", shapes=True)
    schedule_sampler: str = option(
        "uniform",
        "distribution of training timesteps",
        choices=("uniform", "loss-second-moment"),
        shapes=True,
    )
    loss_type: str = option("mse", "loss on the prediction", choices=("mse", "l1"), shapes=True)
    loss_weight: str = option(
        "none",
        "weight of the loss by step; min_snr = min(SNR, min_snr_gamma) on the error of x_0",
        choices=LOSS_WEIGHTS,
        shapes=True,
    )
    min_snr_gamma: float = option(5.0, "largest weight of min_snr", low=0.0, shapes=True)
    model_mean_type: str = option("mollified_epsilon", "what the network predicts", choices=PREDICTIONS, shapes=True)
    final_estimate: str = option(
        "auto",
        "where images come from in the end: network = its x_0, which only xstart predicts; filter = the Wiener filter; "
        "auto = network for xstart, filter for others",
        choices=("auto", "network", "filter"),
    )
    gaussian_filter_std: float = option(
        1.0,
        "mollifier width in pixels of the training lattice; 0 = white noise",
        low=0.0,
        shapes=True,
    )
    mollifier_type: str = option(
        "dct",
        "mollifier: exact in the cosine basis, or a truncated convolution",
        choices=("dct", "conv"),
        shapes=True,
    )
    multiscale_loss: bool = option(False, "add the loss at coarser scales", shapes=True)
    multiscale_max_img_size: int = option(
        128,
        "finest grid of the multi-scale loss",
        low=1,
        derived="data.img_size // 2",
        shapes=True,
    )


@dataclass(frozen=True)
class LatentDiffusionConfig:
    steps: int = option(1000, "diffusion steps", low=2, shapes=True)
    noise_schedule: str = option("const0.008", f"one of {', '.join(SCHEDULES)}", shapes=True)
    schedule_sampler: str = option(
        "uniform",
        "distribution of training timesteps",
        choices=("uniform", "loss-second-moment"),
        shapes=True,
    )
    loss_type: str = option("l1", "loss on the prediction", choices=("mse", "l1"), shapes=True)
    loss_weight: str = option(
        "none",
        "weight of the loss by step; min_snr = min(SNR, min_snr_gamma) on the error of x_0",
        choices=LOSS_WEIGHTS,
        shapes=True,
    )
    min_snr_gamma: float = option(5.0, "largest weight of min_snr", low=0.0, shapes=True)
    model_mean_type: str = option(
        "epsilon", "what the network predicts", choices=("epsilon", "xstart", "v"), shapes=True
    )


@dataclass(frozen=True)
class McIntegralConfig:
    type: str = option("uniform", "how coordinates are drawn", choices=("uniform", "halton", "sobol"), shapes=True)
    ratio: float = option(0.25, "part of the lattice seen per image", low=0.0, high=1.0, shapes=True)
    q_sample: int = option(
        16384,
        "points seen per image",
        low=1,
        derived="mc_integral.ratio * data.img_size * data.img_width",
        shapes=True,
    )


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = option(5e-5, "learning rate", low=0.0)
    adam_beta1: float = option(0.9, "Adam first-moment decay", low=0.0, high=0.9999999)
    adam_beta2: float = option(0.99, "Adam second-moment decay", low=0.0, high=0.9999999)
    weight_decay: float = option(0.0, "decoupled weight decay (AdamW)", low=0.0)
    warmup_steps: int = option(0, "steps of linear learning-rate warm-up", low=0)
    schedule: str = option(
        "constant",
        "learning rate after the warm-up; cosine = to 0 at train.steps; inverse_sqrt = by 1/sqrt(step)",
        choices=RATE_SCHEDULES,
    )
    schedule_ref_steps: int = option(1000, "steps at the full rate before inverse_sqrt lowers it", low=1)
    gradient_skip: bool = option(False, "skip steps with a large gradient norm")
    gradient_skip_threshold: float = option(500.0, "gradient norm from which a step is skipped", low=0.0)
    max_nonfinite_steps: int = option(
        50, "steps in a row with a gradient that is not finite, all skipped, at which training stops", low=1
    )


@dataclass(frozen=True)
class LatentOptimizerConfig(OptimizerConfig):
    learning_rate: float = option(1e-4, "learning rate", low=0.0)
    weight_decay: float = option(0.04, "decoupled weight decay (AdamW)", low=0.0)


@dataclass(frozen=True)
class LatentDataConfig:
    test_ratio: float = option(0.05, "part of the images whose latents are held out", low=0.0, high=0.9, shapes=True)
    fid_samples: int = option(50000, "number of samples for FID", low=1)


@dataclass(frozen=True)
class ImageConfig:
    """Stage one: the diffusion autoencoder of functions."""

    run: RunConfig
    data: DataConfig
    train: ImageTrainConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    mc_integral: McIntegralConfig
    optimizer: OptimizerConfig

    @property
    def size(self) -> tuple[int, int]:
        """The training lattice (H, W)."""
        return self.data.img_size, self.data.img_width


@dataclass(frozen=True)
class LatentConfig:
    """Stage two: the diffusion prior on the encoder's latents."""

    run: RunConfig
    data: LatentDataConfig
    train: LatentTrainConfig
    model: LatentModelConfig
    diffusion: LatentDiffusionConfig
    optimizer: LatentOptimizerConfig
