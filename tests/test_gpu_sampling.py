"""What a sampling does once and not at every step, shown where there is no GPU."""

import collections
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import micro
from diffusion.transfer import to_device
from fake_gpu import Waits, can_pretend, moved
from infty_diff.cast_weights import cast_weights
from infty_diff.model import InftyDiff, SamplingOptions
from models.factory import build_denoiser, build_encoder
from runtime.precision import Precision, pick_device

CPU = torch.device("cpu")


def model(root, changes=None, dtype=torch.bfloat16) -> InftyDiff:
    config = micro.image(root, changes)
    torch.manual_seed(0)
    networks = [build(config.model, config.data.channels, config.size) for build in (build_encoder, build_denoiser)]
    for network in networks:
        network.requires_grad_(False)  # autocast keeps no cast weight that takes no gradient
    return InftyDiff(config, *networks, precision=Precision(CPU, dtype))


class Casts(TorchDispatchMode):
    """Counts the casts of every parameter of a network."""

    def __init__(self, network):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in network.named_parameters()}
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        if operator is torch.ops.aten._to_copy.default and arguments[0].data_ptr() in self.names:
            self.counts[self.names[arguments[0].data_ptr()]] += 1
        return operator(*arguments, **(keywords or {}))


@pytest.mark.parametrize("steps", ["2", "5"])
def test_weights_are_cast_once_in_a_sampling(tmp_path, steps):
    drawer = model(tmp_path)
    noise, latents = drawer.initial_noise([3, 4], (16, 12)), torch.randn(2, drawer.config.model.z_dim)
    with Casts(drawer.denoiser) as casts:
        drawer.decode(latents, noise, SamplingOptions(steps))
    weights = {name for name, p in drawer.denoiser.named_parameters() if p.ndim > 1}
    assert weights <= casts.counts.keys()
    again = [name for name, count in casts.counts.items() if count > 1]
    assert all(re.fullmatch(r"\w+_blocks\.\d\.(kernel|mlp\..*)", name) for name in again), again


@pytest.mark.parametrize(
    "changes", [{}, {"model.uno_conv_type": "spectral"}, {"model.downsampling": "random"}], ids=str
)
def test_cast_weights_give_the_same_bits_and_change_nothing(tmp_path, changes):
    drawer = model(tmp_path, changes)
    network, before = drawer.denoiser, {k: v.clone() for k, v in drawer.denoiser.state_dict().items()}
    cast = cast_weights(network, torch.bfloat16)
    states = torch.randn(2, 3, 9, 14)
    inputs = [drawer.process.respaced("3"), states, torch.tensor([1, 1])]
    latents = torch.randn(2, drawer.config.model.z_dim)
    results = []
    for used in (network, cast):
        drawer.denoiser = used
        results.append(drawer.denoiser_at(latents, inputs[0])(*inputs[1:]).smooth)
    assert torch.equal(*results)
    assert results[0].dtype == torch.float32
    assert cast_weights(network, None) is network
    after = network.state_dict()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)
    assert cast.grid.fc0.weight.dtype == torch.bfloat16
    assert cast.grid.mid_block1.norm_in.weight is network.grid.mid_block1.norm_in.weight


def test_float32_is_not_rounded_to_tf32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert pick_device("cpu") == CPU
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_copies_to_a_gpu_are_not_waited_for(monkeypatch):
    class Host:
        device, calls = CPU, []

        def pin_memory(self):
            self.calls.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            self.calls.append((device.type, non_blocking))

    to_device(Host(), torch.device("cuda"))
    assert Host.calls == ["pinned", ("cuda", True)]
    x = torch.ones(2)
    assert to_device(x, CPU) is x


@can_pretend
@pytest.mark.parametrize(
    ("sampler", "size", "changes"),
    [
        ("ddim", (24, 40), {}),
        ("ddpm", (24, 40), {}),
        ("dpmpp", (520, 600), {"diffusion.model_mean_type": "epsilon"}),
        ("ddim", (16, 9), {"model.kernel": "continuous", "model.learn_sigma": True}),
    ],
    ids=str,
)
def test_no_step_of_a_sampler_waits(tmp_path, fake_gpu, sampler, size, changes):
    """On tensors that carry a device and no values: reading one is an error, and no copy from the host is waited for.

    The first sampling copies tables that last.
    """
    counts = []
    for steps in ("2", "2", "4"):
        drawer = model(tmp_path, changes)
        with fake_gpu(), Waits() as waits:
            for network in (drawer.encoder, drawer.denoiser):
                moved(network)
            drawer.precision = Precision(torch.device("cuda"), torch.bfloat16)
            noise = drawer.initial_noise([3, 4], size)
            latents = torch.empty(2, drawer.config.model.z_dim, device="cuda")
            options = SamplingOptions(steps, sampler, eta=0.5 * (sampler == "ddim"))
            out = drawer.decode(latents, noise, options, step_noise=drawer.step_noise([3, 4], size))
            assert out.device.type == "cuda" and out.dtype == torch.float32
        counts.append(waits.count)
    assert counts[1:] == [0, 0]


class Calls(TorchDispatchMode):
    """Counts the operators called, but for views, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.counts[operator.name()] += not (operator.is_view or operator.namespace == "prim")
        return operator(*arguments, **(keywords or {}))


@can_pretend
def test_one_more_block_calls_its_own_layers_alone(tmp_path, fake_gpu):
    """No evaluation pays for a block's modulation, cast weights or changes of layout: a launch takes the host long."""
    pytest.importorskip("triton")
    found = []
    for blocks in ((1, 1), (2, 1)):
        drawer = model(tmp_path, {"model.uno_blocks_per_level": blocks})
        with fake_gpu():
            moved(drawer.denoiser)
            drawer.precision = Precision(torch.device("cuda"), torch.bfloat16)
            latents, states = (
                torch.empty(2, drawer.config.model.z_dim, device="cuda"),
                torch.empty(2, 3, 16, 12, device="cuda"),
            )
            denoise = drawer.denoiser_at(latents, drawer.process.respaced("3"))
            for _ in range(2):  # the first makes tables that last
                with Calls() as calls:
                    denoise(states, torch.ones(2, dtype=torch.int64, device="cuda"))
        found.append(calls.counts)
    layers = {"infty_diff::norm_affine": 4, "aten::gelu": 4, "aten::convolution": 4, "aten::add.Tensor": 2}
    joined = {"aten::cat": 1, "aten::addmm": 1}  # on the way up
    assert found[1] - found[0] == layers | joined and found[0] - found[1] == {}
