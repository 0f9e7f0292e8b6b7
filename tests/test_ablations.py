"""The ablations: each differs from the base by one line, is as large as it should be, and trains."""

import dataclasses
from pathlib import Path

import pytest
import torch

import micro
from configs.schema import ImageConfig
from configs.validate import freeze
from data.datasets import open_dataset
from diffusion.factory import build_image_process
from diffusion.process import Prediction
from models.factory import build_denoiser, build_encoder
from runtime.overrides import load_config
from runtime.precision import Precision
from runtime.stored import flatten
from training.image_stage import ImageStage

CONFIGS = Path(__file__).parents[1] / "configs"
CHANGES = {
    "sparse_downsample": ("model.downsampling", "random"),
    "equidistant_downsample": ("model.downsampling", "equidistant"),
    "nonlinear_kernel": ("model.kernel", "nonlinear"),
    "continuous_kernel": ("model.kernel", "continuous"),
    "quasi_monte_carlo": ("mc_integral.type", "halton"),
    "regular_convs": ("model.depthwise_sparse", False),
    "fourier_grid": ("model.uno_conv_type", "spectral"),
    "white_noise": ("diffusion.gaussian_filter_std", 0.0),
    "predict_x0": ("diffusion.model_mean_type", "xstart"),
    "predict_epsilon": ("diffusion.model_mean_type", "epsilon"),
    "predict_v": ("diffusion.model_mean_type", "v"),
}
NETWORK_OF_OFFSET = 3 * 32 + 33 * 32 + 33 * 64


def config_of(name: str, fields: dict | None = None) -> ImageConfig:
    config = load_config(str(CONFIGS / f"{name}_config.py"))
    for path, value in (fields or {}).items():
        section, key = path.split(".")
        config[section][key] = value
    return freeze(config)


def test_every_ablation_is_listed_here():
    assert {file.stem for file in CONFIGS.glob("ablation_*.py")} == {f"ablation_{name}_config" for name in CHANGES}


@pytest.mark.parametrize("name", CHANGES)
def test_it_differs_from_the_base_by_one_field_and_its_name(name):
    base = flatten(dataclasses.asdict(config_of("ffhq_128")))
    ablation = flatten(dataclasses.asdict(config_of(f"ablation_{name}")))
    changed = {key: value for key, value in ablation.items() if value != base[key]}
    # The paper finds the images of every network by a filter.
    kept = {"diffusion.final_estimate": "filter"} if name == "predict_x0" else {}
    assert changed == {CHANGES[name][0]: CHANGES[name][1], **kept, "run.experiment": f"ablation_{name}"}


@pytest.mark.parametrize(
    ("name", "denoiser", "encoder"),
    [
        ("ffhq_128", 0, 0),
        # On the way up the grid has 4 × 4 transposed kernels, the points have 3 × 3 ones.
        ("ablation_sparse_downsample", (9 - 16) * (512 * 256 + 256 * 128 + 128 * 64), 0),
        ("ablation_nonlinear_kernel", 6 * 64 * 49, 3 * 64 * 49),
        ("ablation_continuous_kernel", 6 * (NETWORK_OF_OFFSET - 64 * 49), 3 * (NETWORK_OF_OFFSET - 64 * 49)),
        ("ablation_regular_convs", 6 * 64 * 63 * 49, 3 * 64 * 63 * 49),
    ],
)
def test_parameters_beside_those_of_the_base(name, denoiser, encoder):
    config = config_of(name)
    with torch.device("meta"):
        networks = [build(config.model, 3, config.size) for build in (build_denoiser, build_encoder)]
    count = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert count == [43_591_747 + denoiser, 16_256_832 + encoder]


@pytest.mark.parametrize("name", CHANGES)
def test_it_trains_a_step(name, tmp_path):
    fields = {path: value for path, value in micro.overrides(tmp_path, micro.IMAGE).items() if path != CHANGES[name][0]}
    config = config_of(f"ablation_{name}", fields)
    section, key = CHANGES[name][0].split(".")
    assert getattr(getattr(config, section), key) == CHANGES[name][1]
    data = open_dataset(config.data, "train")
    torch.manual_seed(0)
    stage = ImageStage(config, data, data, Precision(torch.device("cpu"), None))
    images = torch.stack([data[i] for i in range(4)])
    optimizer = torch.optim.SGD([p for module in stage.modules.values() for p in module.parameters()], 1e-2)
    losses = []
    for _ in range(2):
        loss, *_ = stage.loss(images, stage.draw(torch.Generator().manual_seed(1), 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for module in stage.modules.values():
        assert [name for name, parameter in module.named_parameters() if parameter.grad is None] == []
    assert losses[1] < losses[0] < float("inf")


def test_white_noise_diffusion_predicts_the_noise_itself():
    """Without the mollifier the base's prediction T ξ is ξ: no second line is needed."""
    process = build_image_process(config_of("ablation_white_noise"))
    assert process.mollifier.identity and process.prediction is Prediction.MOLLIFIED_EPS
    white = torch.randn(1, 3, 128, 128)
    x_0, t = torch.randn_like(white), torch.tensor([700])
    x_t, target = process.training_pair(x_0, t, white)
    alpha_bar = float(process.schedule.alpha_bar[700])
    torch.testing.assert_close(target, white)
    torch.testing.assert_close(x_t, alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * white)
