"""A training step on a GPU never waits for the device, and mixes no devices.

PyTorch's fake tensors carry a device, a type and a shape, and refuse to hand out values: networks and loss that run on
fake CUDA tensors read nothing back, which any machine can show. (Autograd asks for the device itself.) Where there is a
GPU, the whole step runs, and CUDA itself reports waits.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import micro
from data.datasets import open_dataset
from diffusion import subsets
from models import interpolation, neighbours
from training.image_stage import ImageStage
from training.precision import Precision
from training.run_dir import RunDir
from training.trainer import Trainer

HAS_GPU = torch.cuda.is_available()
CHANGES = {"train.amp": True, "train.compile": "off", "train.ema_update_every": 1}
VARIANTS = [
    {},
    {"mc_integral.type": "halton", "model.stochastic_encoding": True, "model.learn_sigma": True},
    {"diffusion.multiscale_loss": True, "train.recompute": True, "model.depthwise_sparse": False},
    {"model.backend": "torch_dense", "diffusion.gaussian_filter_std": 0.0, "diffusion.model_mean_type": "v"},
    {"mc_integral.q_sample": 16 * 12, "model.nf": 16, "model.uno_conv_type": "spectral"},
]


def can_pretend() -> bool:
    """Whether fake tensors on a GPU can be computed with where there is none; PyTorch 2.7 asks the driver."""
    try:
        with FakeTensorMode():
            places = torch.zeros(1, dtype=torch.int64, device="cuda")
            return torch.zeros(2, device="cuda")[places].device.type == "cuda"
    except RuntimeError:
        return False


def stage_on_cpu(root, changes) -> ImageStage:
    config = micro.image(root, {**CHANGES, **changes})
    data = open_dataset(config.data, "train")
    return ImageStage(config, data, data, Precision(torch.device("cpu"), None))


def pretend(stage: ImageStage) -> None:
    """Let the parameters be on a GPU and have no values."""
    for network in stage.modules.values():
        for module in network.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="cuda")))
    stage.device = torch.device("cuda")


@pytest.mark.skipif(HAS_GPU, reason="the step itself runs on the GPU")
@pytest.mark.skipif(not HAS_GPU and not can_pretend(), reason="fake tensors need a driver in this PyTorch")
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_no_value_is_read_back_before_the_backward_pass(tmp_path, monkeypatch, changes):
    def on_the_host(function):
        """Tables are made on the host once and kept: not part of a step."""

        def table(*arguments):
            with unset_fake_temporarily():
                made = function(*arguments[:-1], torch.device("cpu"))
            parts = made if isinstance(made, tuple) else (made,)
            parts = [torch.empty(part.shape, dtype=part.dtype, device=arguments[-1]) for part in parts]
            if hasattr(made, "_fields"):
                return type(made)(*parts)
            return parts if isinstance(made, tuple) else parts[0]

        return table

    monkeypatch.setattr(neighbours, "_most_tied", lambda *_: neighbours._MOST_TIED)  # read from a table on the host
    tables = [(neighbours, name) for name in ("_columns", "_nearest_on_full_lattice")]
    for module, name in [*tables, (interpolation, "_full_lattice_reads"), (subsets, "_sequence")]:
        monkeypatch.setattr(module, name, on_the_host(getattr(module, name)))
    fused = pytest.importorskip("models.operators.native.triton_pointwise")
    monkeypatch.setattr(fused, "_shared_memory", lambda device: 227 * 1024)  # of an H100; asked of the device
    stage = stage_on_cpu(tmp_path, changes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend(stage)
        images = torch.zeros(4, 3, *stage.config.size, dtype=torch.uint8, device="cuda")
        loss, scalars = stage.loss(images, torch.Generator())
        assert all(value.device.type == "cuda" for value in (loss, *scalars.values()))


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
