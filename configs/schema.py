"""Every configuration field of the project: its type, default, accepted values and meaning.

This table is the one place that states a default; which names a field accepts is said where they are implemented.
`configs/defaults.py` turns it into `ConfigDict`s, `configs/validate.py` checks those against it and returns the frozen
dataclasses below, which is what the rest of the code receives. Field names are those of the authors' configurations.
"""

from dataclasses import dataclass, fields
from typing import Any

from configs.option import option
from data.base import MEMORY_MODES
from data.datasets import DATASETS, SPLIT_RULES
from data.field_pictures import ORIGINS
from data.images import ERROR_MODES
from diffusion.coordinates import CONVENTIONS
from diffusion.losses import LOSS_WEIGHTS, LOSSES
from diffusion.mollifier import MOLLIFIERS
from diffusion.process import FINAL_ESTIMATES, PREDICTIONS, Prediction
from diffusion.schedules import SCHEDULES_ACCEPTED
from diffusion.subsets import DRAWS
from diffusion.timestep_sampling import TIMESTEP_SAMPLERS
from models.coarse_nodes import NODES
from models.grid_unet import CONV_TYPES
from models.latent_mlp import LEAST
from models.layers import ATTENTION_KERNELS
from models.operators.dispatch import BACKEND_NAMES
from models.sparse_block import KERNELS
from training.power_averages import LONGEST
from training.rates import DECAYS

# Upper ends of ranges: what is larger is a slip of the pen, or more than any machine holds.
MOST_SIDE = 65_536  # of an image, in pixels
MOST_CHANNELS = 1024  # of a function
MOST_SEED = 2**53 - 1
MOST_SAMPLES = 10**7
_MANY, _WIDE, _DEEP = 10**9, 65_536, 1000  # steps and images, channels, layers
LATENT_PREDICTIONS = tuple(name for name in PREDICTIONS if name != Prediction.MOLLIFIED_EPS.value)


def sections(stage: type) -> dict[str, Any]:
    """The sections of `ImageConfig` or `LatentConfig`: name -> dataclass."""
    return {section.name: section.type for section in fields(stage)}


@dataclass(frozen=True)
class RunConfig:
    name: str = option("infty_diff", "project name shown by wandb")
    experiment: str = option("experiment", "name of the run: its folder under run.root_dir")
    root_dir: str = option("checkpoints", "folder in which runs are kept")
    seed: int = option(
        0, "seed of initialisation, data order, coordinates and noise", low=0, high=MOST_SEED, shapes=True
    )
    device: str = option("auto", "device to run on: auto, cpu, cuda or cuda:N")
    logger: str = option("none", "metrics and previews go there too: none, tensorboard, wandb, or tensorboard,wandb")
    wandb_mode: str = option(
        "disabled",
        "how Weights & Biases logs; disabled = online with run.logger=wandb, else not at all",
        choices=("disabled", "offline", "online"),
    )
    wandb_dir: str = option("", "folder for wandb files; empty = the run folder")


@dataclass(frozen=True)
class DataConfig:
    name: str = option("functions", "kind of data", choices=DATASETS, shapes=True)
    root_dir: str = option(
        "", "folder, zip, tars, LMDB or .npz of the images, file or folder of fields; unused for functions"
    )
    img_size: int = option(256, "height of the training images in pixels", low=4, high=MOST_SIDE, shapes=True)
    img_width: int = option(
        256, "width of the training images in pixels", low=4, high=MOST_SIDE, derived="data.img_size", shapes=True
    )
    channels: int = option(
        3, "channels: 1, 3 or 4 of images, any number of fields", low=1, high=MOST_CHANNELS, shapes=True
    )
    fields: str = option(
        "", "variables of a file of fields, with commas between: its channels; empty = the only one", shapes=True
    )
    anomalies: bool = option(False, "subtract the mean map of the training fields, and add it to results", shapes=True)
    unknown: str = option(
        "skip",
        "points of fields that are not known: skip = neither seen nor scored; complete = drawn, then as if known",
        choices=("skip", "complete"),
        shapes=True,
    )
    origin: str = option(
        "upper", "where pictures of fields show row 0; lower for maps from south to north", choices=ORIGINS
    )
    random_flip: bool = option(True, "mirror training images at random")
    split: str = option(
        "published",
        "training and validation images: as published, else by a hash of the names; authors = for ffhq, the first "
        "1 - val_ratio of the sorted names are for training",
        choices=SPLIT_RULES,
        shapes=True,
    )
    val_ratio: float = option(0.05, "fraction held out where no published split exists", low=0.0, high=0.9, shapes=True)
    on_error: str = option("raise", "what to do with a corrupt or too small image", choices=ERROR_MODES)
    in_memory: str = option("auto", "keep decoded images in memory", choices=MEMORY_MODES)
    memory_gb: float = option(8.0, "largest decoded data set kept in memory when in_memory=auto", low=0.0, high=1e6)
    num_workers: int = option(4, "decoding processes when images are not kept in memory", low=0, high=1024)
    num_images: int = option(4096, "number of procedural functions", low=1, high=_MANY, shapes=True)
    seed: int = option(0, "seed of the procedural functions", low=0, high=MOST_SEED, shapes=True)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(1_000_000, "total optimiser steps", low=1, high=_MANY)
    batch_size: int = option(32, "images per step, over all processes", low=1, high=1_000_000)
    accumulate: int = option(
        1, "parts in which each process computes its images of a step: less memory", low=1, high=1_000_000
    )
    amp: bool = option(True, "mixed precision on a GPU (always off on a CPU); False = float32 throughout, without TF32")
    amp_dtype: str = option(
        "auto",
        "bfloat16 where the hardware has it, else float16 with loss scaling",
        choices=("auto", "bfloat16", "float16"),
    )
    load_checkpoint: bool = option(True, "continue the newest checkpoint of the run if there is one")
    plot_graph_steps: int = option(100, "steps between log lines", low=1, high=_MANY)
    plot_samples_steps: int = option(5000, "steps between previews", low=1, high=_MANY)
    checkpoint_steps: int = option(10000, "steps between checkpoints", low=1, high=_MANY)
    keep_checkpoints: int = option(2, "newest checkpoints kept on disk", low=1, high=_MANY)
    keep_every: int = option(
        0, "also keep the checkpoints and weights of multiples of this step; 0 = none", low=0, high=_MANY
    )
    sample_size: int = option(8, "images in a preview", low=1, high=10_000)
    plot_sampling_steps: str = option("100", "step subset used for previews")
    ema_update_every: int = option(10, "steps between updates of the EMA weights", low=1, high=_MANY)
    ema_decay: float = option(0.995, "decay of the EMA weights", low=0.0, high=1.0)
    ema_lengths: tuple = option(
        (),
        "relative standard deviations of power-function averages, e.g. (0.05, 0.10), kept beside the EMA weights; from "
        "them experiments/choose_average.py makes averages of other lengths",
        items=float,
        low=1e-6,
        high=LONGEST,
    )
    ema_snapshot_steps: int = option(
        10000, "steps between files of these averages", low=1, high=_MANY, derived="train.checkpoint_steps"
    )
    ema_snapshots: int = option(
        64,
        "most such files; past it every second one goes. Each takes 2 bytes, in float32 4, per parameter and length",
        low=4,
        high=100_000,
    )
    ema_snapshot_dtype: str = option("float16", "precision of these files", choices=("float16", "float32"))
    gradient_clip: float = option(1.0, "largest gradient norm per network; 0 = no clipping", low=0.0, high=1e12)
    compile: str = option(
        "auto",
        "torch.compile of the dense part of each network, by mode; reduce-overhead = CUDA graphs; auto = on a GPU",
        choices=("auto", "off", "default", "reduce-overhead", "max-autotune"),
    )
    init_from: str = option("", "run or saved model whose EMA weights a new run starts from", shapes=True)


@dataclass(frozen=True)
class ImageTrainConfig(TrainConfig):
    recompute: bool = option(False, "keep no activations inside residual blocks: less memory, a third more arithmetic")
    val_loss_steps: int = option(5000, "steps between losses on held-out images; 0 = never", low=0, high=_MANY)
    val_images: int = option(512, "held-out images, at most, of which the loss is computed", low=1, high=_MANY)


@dataclass(frozen=True)
class LatentTrainConfig(TrainConfig):
    batch_size: int = option(256, "latents per step, over all processes", low=1, high=1_000_000)
    plot_samples_steps: int = option(20000, "steps between previews", low=1, high=_MANY)
    calculate_test_loss_steps: int = option(10000, "steps between evaluations on held-out latents", low=1, high=_MANY)
    test_loss_repeats: int = option(10, "noise draws per held-out latent in an evaluation", low=1, high=100_000)


@dataclass(frozen=True)
class ModelConfig:
    nf: int = option(64, "channels of the sparse level", low=1, high=_WIDE, shapes=True)
    time_emb_dim: int = option(256, "width of the time embedding", low=4, high=_WIDE, shapes=True)
    num_conv_blocks: int = option(3, "sparse blocks on the way in, and on the way out", low=1, high=_DEEP, shapes=True)
    downsampling: str = option(
        "grid",
        "from points to the nodes of the U-Net: interpolation to a grid, or subsets of the points (Table 2)",
        choices=NODES,
        shapes=True,
    )
    knn_neighbours: int = option(3, "points averaged into a grid cell", low=1, high=_DEEP, shapes=True)
    depthwise_sparse: bool = option(True, "depthwise (True) or full (False) sparse convolutions", shapes=True)
    kernel_size: int = option(7, "side of the sparse kernel at the training size; odd", low=1, high=255, shapes=True)
    kernel: str = option(
        "linear",
        "sparse kernel: weights; conv, activation, conv (Table 2); or a network of the offset",
        choices=KERNELS,
        shapes=True,
    )
    backend: str = option(
        "auto", "back end of the sparse convolution; auto = the fastest of native, torch_dense", choices=BACKEND_NAMES
    )
    tile_points: int = option(
        4194304,
        "points of an image whose features are held at once when sampling; larger images go tile by tile, which takes "
        "more time; 0 = all",
        low=0,
        high=2**31 - 1,
    )
    uno_res: int = option(128, "side of the grid of the inner U-Net", low=1, high=MOST_SIDE, shapes=True)
    uno_base_channels: int = option(128, "channels of the finest U-Net level", low=1, high=_WIDE, shapes=True)
    uno_mults: tuple = option((1, 2, 4, 8, 8), "channel multiplier of each U-Net level", low=1, high=_DEEP, shapes=True)
    uno_blocks_per_level: tuple = option(
        (2, 2, 2, 2, 2), "residual blocks of each U-Net level", low=1, high=_DEEP, shapes=True
    )
    uno_attn_resolutions: tuple = option(
        (16, 8), "U-Net resolutions with attention", low=1, high=MOST_SIDE, shapes=True
    )
    uno_dropout_from_resolution: int = option(
        16, "dropout at this U-Net resolution and below", low=0, high=MOST_SIDE, shapes=True
    )
    uno_dropout: float = option(0.1, "dropout rate", low=0.0, high=0.99, shapes=True)
    uno_conv_type: str = option("conv", "U-Net convolutions", choices=CONV_TYPES, shapes=True)
    z_dim: int = option(1024, "size of the latent", low=1, high=_WIDE, shapes=True)
    learn_sigma: bool = option(False, "predict the reverse variance too", shapes=True)
    sigma_small: bool = option(False, "fixed reverse variance: posterior (True) or beta (False)", shapes=True)
    stochastic_encoding: bool = option(False, "encoder returns a distribution instead of a vector", shapes=True)
    kld_weight: float = option(1e-4, "weight of the KL term of a stochastic encoder", low=0.0, high=1e12, shapes=True)
    coordinate_convention: str = option(
        "cell_centred",
        "where pixel i of n sits, and how networks go between resolutions; reference = the authors' code",
        choices=CONVENTIONS,
        shapes=True,
    )
    encoder_block_norm: bool = option(
        True, "norms in the encoder's sparse blocks; False = the authors' encoder", shapes=True
    )
    encoder_texture: tuple = option(
        (),
        "windows (rows, columns) in which the encoder measures texture: autocorrelations of local contrast; () = none",
        items=int,
        low=1,
        high=MOST_SIDE,
        shapes=True,
    )
    attention: str = option("sdpa", "attention kernels", choices=ATTENTION_KERNELS)


@dataclass(frozen=True)
class LatentModelConfig:
    hid_channels: int = option(2048, "hidden width", low=1, high=_WIDE, shapes=True)
    num_layers: int = option(10, "layers", low=LEAST, high=_DEEP, shapes=True)
    time_embed_dim: int = option(128, "width of the time features", low=LEAST, high=_WIDE, shapes=True)
    dropout: float = option(0.0, "dropout rate", low=0.0, high=0.99, shapes=True)
    learn_sigma: bool = option(False, "predict the reverse variance too", shapes=True)
    sigma_small: bool = option(False, "fixed reverse variance: posterior (True) or beta (False)", shapes=True)


@dataclass(frozen=True)
class ProcessConfig:
    """What both stages have in common, with the defaults of the first."""

    steps: int = option(1000, "diffusion steps", low=2, high=100_000, shapes=True)
    noise_schedule: str = option("cosine", SCHEDULES_ACCEPTED, shapes=True)
    schedule_sampler: str = option(
        "uniform", "distribution of training timesteps", choices=TIMESTEP_SAMPLERS, shapes=True
    )
    loss_type: str = option("mse", "loss on the prediction", choices=LOSSES, shapes=True)
    loss_weight: str = option(
        "none",
        "weight of the loss by step; min_snr = min(SNR, min_snr_gamma) on the error of x_0",
        choices=LOSS_WEIGHTS,
        shapes=True,
    )
    min_snr_gamma: float = option(5.0, "largest weight of min_snr", low=0.0, high=1e12, shapes=True)
    model_mean_type: str = option("mollified_epsilon", "what the network predicts", choices=PREDICTIONS, shapes=True)


@dataclass(frozen=True)
class DiffusionConfig(ProcessConfig):
    final_estimate: str = option(
        "auto",
        "where images come from in the end: network = its x_0, which only xstart predicts; filter = the Wiener filter; "
        "auto = network for xstart, filter for others",
        choices=FINAL_ESTIMATES,
    )
    gaussian_filter_std: float = option(
        1.0, "mollifier width in pixels at the training size; 0 = white noise", low=0.0, high=1e4, shapes=True
    )
    mollifier_type: str = option(
        "dct", "mollifier: exact in the cosine basis, or a truncated convolution", choices=MOLLIFIERS, shapes=True
    )
    multiscale_loss: bool = option(False, "add the loss at coarser scales", shapes=True)
    multiscale_max_img_size: int = option(
        128, "finest grid of the multi-scale loss", low=1, high=MOST_SIDE, derived="data.img_size // 2", shapes=True
    )


@dataclass(frozen=True)
class LatentDiffusionConfig(ProcessConfig):
    noise_schedule: str = option("const0.008", SCHEDULES_ACCEPTED, shapes=True)
    loss_type: str = option("l1", "loss on the prediction", choices=LOSSES, shapes=True)
    model_mean_type: str = option("epsilon", "what the network predicts", choices=LATENT_PREDICTIONS, shapes=True)


@dataclass(frozen=True)
class McIntegralConfig:
    type: str = option("uniform", "how coordinates are drawn", choices=DRAWS, shapes=True)
    ratio: float = option(0.25, "fraction of the pixels seen per image", low=0.0, high=1.0, shapes=True)
    q_sample: int = option(
        16384,
        "points seen per image",
        low=1,
        high=2**31 - 1,
        derived="mc_integral.ratio * data.img_size * data.img_width",
        shapes=True,
    )


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = option(5e-5, "learning rate", low=0.0, high=1e3)
    adam_beta1: float = option(0.9, "Adam first-moment decay", low=0.0, high=0.9999999)
    adam_beta2: float = option(0.99, "Adam second-moment decay", low=0.0, high=0.9999999)
    weight_decay: float = option(0.0, "decoupled weight decay (AdamW)", low=0.0, high=1e3)
    warmup_steps: int = option(0, "steps of linear learning-rate warm-up", low=0, high=_MANY)
    schedule: str = option(
        "constant",
        "learning rate after the warm-up; cosine = to 0 at train.steps; inverse_sqrt = by 1/sqrt(step)",
        choices=DECAYS,
    )
    schedule_ref_steps: int = option(1000, "steps at the full rate before inverse_sqrt lowers it", low=1, high=_MANY)
    gradient_skip: bool = option(False, "skip steps with a large gradient norm")
    gradient_skip_threshold: float = option(500.0, "gradient norm from which a step is skipped", low=0.0, high=1e12)
    max_nonfinite_steps: int = option(
        50, "steps in a row with a gradient that is not finite, all skipped, at which training stops", low=1, high=_MANY
    )


@dataclass(frozen=True)
class LatentOptimizerConfig(OptimizerConfig):
    learning_rate: float = option(1e-4, "learning rate", low=0.0, high=1e3)
    weight_decay: float = option(0.04, "decoupled weight decay (AdamW)", low=0.0, high=1e3)


@dataclass(frozen=True)
class LatentDataConfig:
    test_ratio: float = option(
        0.05, "fraction of the images whose latents are held out", low=0.0, high=0.9, shapes=True
    )
    fid_samples: int = option(50000, "samples that generate_samples draws by default", low=1, high=MOST_SAMPLES)


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
