"""A training step on a GPU never waits for the device, and mixes no devices.

Networks and loss run on fake tensors (`fake_gpu`), which read nothing back. (Autograd asks for the device itself.)
Where there is a GPU, the whole step runs, and CUDA itself reports waits. The back end torch_dense is for comparison and
may wait: plain PyTorch asks the device for nodes that are far from all points.
"""

import pytest
import torch

import micro
from data.datasets import open_dataset
from diffusion.factory import build_timesteps
from fake_gpu import can_pretend, moved
from runtime.precision import Precision
from runtime.run_dir import RunDir
from training.image_stage import ImageStage
from training.trainer import Trainer

HAS_GPU = torch.cuda.is_available()
CHANGES = {"train.amp": True, "train.compile": "off", "train.ema_update_every": 1}
VARIANTS = [
    {},
    {"mc_integral.type": "halton", "model.stochastic_encoding": True, "model.learn_sigma": True},
    {"diffusion.multiscale_loss": True, "train.recompute": True, "model.depthwise_sparse": False},
    {"diffusion.gaussian_filter_std": 0.0, "diffusion.model_mean_type": "v"},
    {"mc_integral.q_sample": 16 * 12, "model.nf": 16, "model.uno_conv_type": "spectral"},
    {"diffusion.schedule_sampler": "loss-second-moment"},
    {"diffusion.schedule_sampler": "log-normal"},
]


def stage_on_cpu(root, changes) -> ImageStage:
    config = micro.image(root, {**CHANGES, **changes})
    data = open_dataset(config.data, "train")
    return ImageStage(config, data, data, Precision(torch.device("cpu"), None))


@pytest.mark.skipif(HAS_GPU, reason="the step itself runs on the GPU")
@can_pretend
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_no_value_is_read_back_before_the_backward_pass(tmp_path, fake_gpu, changes):
    stage = stage_on_cpu(tmp_path, changes)
    with fake_gpu():
        for network in stage.modules.values():
            moved(network)
        stage.device = torch.device("cuda")
        stage.timesteps = build_timesteps(
            stage.config.diffusion, stage.process, stage.device, lambda own: own.unsqueeze(0)
        )
        images = torch.zeros(4, 3, *stage.config.size, dtype=torch.uint8, device="cuda")
        draws = stage.draw(torch.Generator(), 8, slice(2, 6))
        loss, each, scalars = stage.loss(images, draws)
        stage.learn(draws, each)
        assert all(value.device.type == "cuda" for value in (loss, *scalars.values(), *draws.values()))


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cuda_reports_no_wait_in_a_step(tmp_path, changes):
    config = micro.image(tmp_path, {**CHANGES, **changes, "run.device": "cuda"})
    data, precision = open_dataset(config.data, "train"), Precision(torch.device("cuda"), torch.bfloat16)
    trainer = Trainer(config, ImageStage(config, data, data, precision), RunDir(config, resume=True), precision)
    batch = torch.zeros(4, 3, *config.size, dtype=torch.uint8).pin_memory()
    for _ in range(2):  # tables are copied and kernels compiled once
        trainer.train_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(torch.tensor(trainer.means.read()["loss"]))
