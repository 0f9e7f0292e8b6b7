"""Checks of networks and their parts against parity vectors. Everything is read from the archive and its `config`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from diffusion.coordinates import CONVENTIONS, Points, gather_points, image_to_points, points_to_image
from diffusion.losses import kl_standard_normal, l1, mse
from diffusion.mollifier import Mollifier
from diffusion.process import DiffusionProcess, Prediction
from diffusion.samplers import ddim
from diffusion.schedules import Schedule
from models.grid_unet import GridBlock
from models.interpolation import grid_to_points, points_to_grid
from models.latent_mlp import MLPSkipNet
from models.layers import Attention, latent_sinusoidal_features, sinusoidal_features
from models.modulation import Conditioning
from models.operators.dispatch import get_backend
from models.operators.sparse_conv.backend import resampled_size
from models.reference_weights import LAYOUTS, state_from_reference
from models.sparse_block import SparseBlock
from parity_vectors import END_TO_END, GRADIENTS, OUTPUTS, TIME_FEATURES, Vectors, assert_close
from reference_networks import gradients_to_reference, network_from_reference

CPU = torch.device("cpu")


def load_network(
    vectors: Vectors, config: dict, kind: str, prefix: str = "param/", convention: str = "reference"
) -> nn.Module:
    """The network a config describes, with the parameters stored under `prefix`, in evaluation mode."""
    network = network_from_reference(config, kind, convention).eval()
    network.load_state_dict(state_from_reference(network, vectors.tensors(prefix), layout_of(config)))
    return network


def layout_of(config: dict) -> str:
    return LAYOUTS[config.get("backend", "torchsparse")]


def check_gradients(vectors: Vectors, prefix: str, module: nn.Module, layout: str) -> None:
    """Gradients by the authors' names against `grad/…param/` and `gradnorm/…`: values, norms, and which there are."""
    ours = gradients_to_reference(module, layout)
    for name in vectors.names(f"grad/{prefix}/param/"):
        key = f"grad/{prefix}/param/{name}"
        assert_close(key, ours[name], vectors.tensor(key), GRADIENTS)
    key = f"gradnorm/{prefix}"
    if f"{key}/names" not in vectors:
        return
    names, values = vectors[f"{key}/names"].tolist(), vectors[f"{key}/values"].tolist()
    assert set(ours) == set(names)
    assert not set(ours) & set(vectors[f"{key}/unused"].tolist())
    for name, value in zip(names, values):
        assert abs(ours[name].double().norm().item() - value) <= GRADIENTS * value, f"{key}: {name}"


@contextmanager
def recorded(modules: dict[str, tuple[nn.Module, bool]]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the output of each module, or its input where the flag is set, while a network runs."""
    stages: dict[str, torch.Tensor] = {}

    def hook(name: str, wants_input: bool):
        return lambda module, inputs, output: stages.__setitem__(name, inputs[0] if wants_input else output)

    handles = [module.register_forward_hook(hook(name, flag)) for name, (module, flag) in modules.items()]
    try:
        yield stages
    finally:
        for handle in handles:
            handle.remove()


def stage_modules(network: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Where the stages of the vectors arise: (module, whether its input is meant)."""
    stages = {f"down_{i}": (block, False) for i, block in enumerate(network.down_blocks)}
    stages |= {f"up_{i}": (block, False) for i, block in enumerate(getattr(network, "up_blocks", []))}
    stages |= {"uno_in": (network.grid, True), "uno_out": (network.grid, False)}
    if hasattr(network, "time_mlp"):
        # Reading the grid and projecting what was read are linear and change places here: both together are compared.
        stages |= {"time_emb": (network.time_mlp, False), "after_grid_sample": (network.up_blocks[0], True)}
    return stages


def check_stages(vectors: Vectors, case: str, stages: dict[str, torch.Tensor], network: nn.Module) -> None:
    for name in vectors.names(f"stage/{case}/"):
        ours = stages[name].movedim(3, 1) if stages[name].ndim == 4 else stages[name]  # grids are channels-last here
        expected = vectors.tensor(f"stage/{case}/{name}")
        if name == "after_grid_sample":
            ours, expected = ours.reshape(-1, ours.shape[-1]), network.from_grid(_features_last(expected, network))
        assert_close(f"stage/{case}/{name}", ours, expected, OUTPUTS)


def _features_last(x: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """Rows (B·M, C) of features stored as (B, M, C), (B·M, C) or an image (B, C, H, W)."""
    x = x.movedim(1, 3) if x.ndim == 4 else x
    return x.reshape(-1, network.grid_spec.input_channels)


def case_inputs(vectors: Vectors, case: str, config: dict) -> tuple[torch.Tensor, torch.Tensor, Points]:
    """The stored x, a leaf; the features (B, M, C) made of it; and the points: a subset, or all of an image."""
    x = vectors.tensor(f"in/{case}/x").requires_grad_()
    index = vectors.optional(f"in/{case}/sample_lst")
    if index is not None:
        return x, x, Points((config["img_size"], config["img_size"]), index)
    return x, image_to_points(x), Points(tuple(x.shape[2:]))


def check_sparse_unet(path: Path, vectors: Vectors, config: dict) -> None:
    network = load_network(vectors, config, "sparse_unet")
    aligned = load_network(vectors, config, "sparse_unet", convention="corner_aligned")
    for case in vectors.heads("in/"):
        if case.endswith("_asis"):
            continue
        x, features, points = case_inputs(vectors, case, config)
        t, z = vectors.tensor(f"in/{case}/t"), vectors.optional(f"in/{case}/z")
        if z is not None:
            z.requires_grad_()
        shaped = (lambda y, p=points: points_to_image(y, p.size)) if points.is_full else (lambda y: y)
        with recorded(stage_modules(network)) as stages:
            y = shaped(network(features, points, t, z))
        check_stages(vectors, case, stages, network)
        assert_close(f"out/{case}/y", y, vectors.tensor(f"out/{case}/y"), OUTPUTS)
        if f"alt/{case}/y_aligned" in vectors:
            with torch.no_grad():
                y_aligned = shaped(aligned(features, points, t, z))
            assert_close(f"alt/{case}", y_aligned, vectors.tensor(f"alt/{case}/y_aligned"), OUTPUTS)
        if f"gradnorm/{case}/names" in vectors:
            network.zero_grad()
            (y * vectors.tensor(f"in/{case}/w")).sum().backward()
            check_gradients(vectors, case, network, layout_of(config))
            for name, leaf in {"x": x, "z": z}.items():
                if f"grad/{case}/{name}" in vectors:
                    assert_close(f"grad/{case}/{name}", leaf.grad, vectors.tensor(f"grad/{case}/{name}"), GRADIENTS)


def check_sparse_encoder(path: Path, vectors: Vectors, config: dict) -> None:
    network = load_network(vectors, config, "sparse_encoder")
    for case in vectors.heads("in/"):
        x, features, points = case_inputs(vectors, case, config)
        with recorded(stage_modules(network)) as stages:
            encoding = network(features, points, vectors.optional(f"in/{case}/eps"))
        check_stages(vectors, case, stages, network)
        outputs = encoding._asdict() if config["stochastic"] else {"z": encoding}
        for name in vectors.names(f"out/{case}/"):
            assert_close(f"out/{case}/{name}", outputs[name], vectors.tensor(f"out/{case}/{name}"), OUTPUTS)
        if f"gradnorm/{case}/names" in vectors:
            network.zero_grad()
            (outputs["z"] * vectors.tensor(f"in/{case}/w")).sum().backward()
            check_gradients(vectors, case, network, layout_of(config))
            if f"grad/{case}/x" in vectors:
                assert_close(f"grad/{case}/x", x.grad, vectors.tensor(f"grad/{case}/x"), GRADIENTS)


def check_mlp_skip_net(path: Path, vectors: Vectors, config: dict) -> None:
    network: MLPSkipNet = load_network(vectors, config, "mlp_skip_net")
    x = vectors.tensor("in/x").requires_grad_()
    with recorded({"time_features": (network.time_mlp, True), "cond": (network.time_mlp, False)}) as stages:
        y = network(x, vectors.tensor("in/t"))
    for name in vectors.names("stage/"):
        tolerance = TIME_FEATURES if name == "time_features" else OUTPUTS
        assert_close(f"stage/{name}", stages[name], vectors.tensor(f"stage/{name}"), tolerance)
    assert_close("out/y", y, vectors.tensor("out/y"), OUTPUTS)
    (y * vectors.tensor("in/w")).sum().backward()
    gradients = gradients_to_reference(network, "ts")
    for name in vectors.names("grad/"):
        ours = x.grad if name == "x" else gradients[name.removeprefix("param/")]
        assert_close(f"grad/{name}", ours, vectors.tensor(f"grad/{name}"), GRADIENTS)


def check_ops(path: Path, vectors: Vectors, config: dict) -> None:
    _check_time_features(vectors)
    for tag in vectors.heads("in/knn/"):
        _check_interpolation(vectors, tag)
    for kernel, train_n, n, expected in vectors["out/kernel_size_table"].tolist():
        assert resampled_size(kernel, n, train_n) == expected, f"kernel {kernel}, {train_n} to {n}"
    for tag in vectors.heads("in/block/"):
        _check_block(vectors, tag, config)
    _check_conv_block(vectors)
    for tag in [name for name in vectors.heads("in/") if name.startswith("attention")]:
        x = vectors.tensor(f"in/{tag}/x")
        attention = Attention(x.shape[1])
        attention.load_state_dict(state_from_reference(attention, vectors.tensors(f"param/{tag}/"), "ts"))
        y = attention(x.movedim(1, 3)).movedim(3, 1)
        assert_close(f"out/{tag}/y", y, vectors.tensor(f"out/{tag}/y"), OUTPUTS)


def _check_time_features(vectors: Vectors) -> None:
    features = {"unet": sinusoidal_features, "latent": latent_sinusoidal_features}
    t = vectors.tensor("in/time/t")
    for name in vectors.names("out/time/"):
        _, kind, dim = name.split("_")
        assert_close(name, features[kind](t, int(dim)), vectors.tensor(f"out/time/{name}"), TIME_FEATURES)


def _check_interpolation(vectors: Vectors, tag: str) -> None:
    side, u, k, _ = (int(number) for number in re.findall(r"\d+", tag))
    points, grid = Points((side, side), vectors.tensor(f"in/knn/{tag}/sample_lst")), (u, u)
    batch, convention = len(points.index), CONVENTIONS["reference"]
    coords = [convention.pixel_coordinate(axis, side) for axis in points.rows_cols()]
    expected = {name: vectors.tensor(f"out/knn/{tag}/{name}") for name in vectors.names(f"out/knn/{tag}/")}
    assert_close(f"{tag} coords", torch.stack(coords, dim=2), expected["coords"], OUTPUTS)
    y = points_to_grid(points, batch, grid, k, convention, CPU)(vectors.tensor(f"in/knn/{tag}/x"))
    assert_close(f"{tag} grid", y, expected["grid"], OUTPUTS)
    features = image_to_points(vectors.tensor(f"in/knn/{tag}/grid"))
    y = grid_to_points(points, batch, grid, convention, CPU)(features)
    assert_close(f"{tag} grid_sample", y, expected["grid_sample"], OUTPUTS)
    y = grid_to_points(points, batch, grid, CONVENTIONS["corner_aligned"], CPU)(features)
    assert_close(f"{tag} aligned", y, vectors.tensor(f"alt/knn/{tag}/grid_sample_aligned"), OUTPUTS)


def _check_block(vectors: Vectors, tag: str, config: dict) -> None:
    backend_name, convolution, conditioning = re.fullmatch(r"(.+)_(dw|full)_(cond|nocond)", tag).groups()
    layout, conditioned = LAYOUTS[backend_name], conditioning == "cond"
    inputs = vectors.tensors(f"in/block/{tag}/")
    kernel_size, side, channels = config["block"]
    backend = get_backend("auto")
    block = SparseBlock(
        channels,
        kernel_size,
        depthwise=convolution == "dw",
        takes_skip="skip" in inputs,
        time_dim=inputs["t"].shape[1] if conditioned else None,
        z_dim=inputs["z"].shape[1] if conditioned else None,
        norm=conditioned or layout == "td",
    )
    block.load_state_dict(state_from_reference(block, vectors.tensors(f"param/block/{tag}/block."), layout))
    points = Points((side, side), inputs["sample_lst"])
    plan = backend.plan(points, len(inputs["x"]), (kernel_size, kernel_size), kernel_size, CPU)
    if f"out/block/{tag}/norm" in vectors:
        density = 1 / plan.inverse_density.squeeze(2)
        assert_close(f"{tag} norm", density, vectors.tensor(f"out/block/{tag}/norm"), OUTPUTS)
    affines = (None, None)
    if conditioned:
        affines = Conditioning(block.modulated, inputs["z"])(inputs["t"])
    y = block(inputs["x"], plan, skip=inputs.get("skip"), affines=affines)
    assert_close(f"{tag} y", y, vectors.tensor(f"out/block/{tag}/y"), OUTPUTS)


def _check_conv_block(vectors: Vectors) -> None:
    inputs, state = vectors.tensors("in/convblock/"), vectors.tensors("param/convblock/")
    x, e, z = inputs["x"].movedim(1, 3), inputs["emb"], inputs["z"]
    expected = {name: vectors.tensor(f"out/convblock/{name}") for name in ("y", "y_nocond")}
    c_in, c_out = x.shape[3], expected["y"].shape[1]
    for name, widths in (("y", (e.shape[1], z.shape[1])), ("y_nocond", (None, None))):
        block = GridBlock(c_in, c_out, *widths, dropout=0.0)
        block.load_state_dict(state_from_reference(block, state, "ts"))
        affines = Conditioning(block.modulated, z)(e) if name == "y" else []
        assert_close(f"convblock {name}", block(x, *affines).movedim(3, 1), expected[name], OUTPUTS)


_PREDICTIONS = {
    "MOLLIFIED_EPSILON": Prediction.MOLLIFIED_EPS,
    "EPSILON": Prediction.EPS,
    "V": Prediction.V,
    "START_X": Prediction.X0,
}
_LOSSES = {"MSE": mse, "L1": l1}


def process_of(config: dict, prediction: Prediction) -> DiffusionProcess:
    """The process a diffusion config describes."""
    resolution = config["img_size"] if config["schedule"].startswith("shifted") else None
    side = config["img_size"]
    mollifier = Mollifier(config["gaussian_filter_std"], (side, side), config["mollifier_type"])
    return DiffusionProcess(Schedule.create(config["schedule"], config["steps"], resolution), mollifier, prediction)


def check_train_step(path: Path, vectors: Vectors, config: dict) -> None:
    networks = {"model": load_network(vectors, config["unet"], "sparse_unet", "param/model/")}
    parts = {"model": config["unet"]}
    if config.get("encoder"):
        networks["encoder"] = load_network(vectors, config["encoder"], "sparse_encoder", "param/encoder/")
        parts["encoder"] = config["encoder"]
    process = process_of(config["diffusion"], _PREDICTIONS[config["diffusion"]["mean_type"]])
    inputs = vectors.tensors("in/")
    x_0, t, size = inputs["x_start"], inputs["t"], tuple(inputs["x_start"].shape[2:])
    points, ours, z = Points(size, inputs["sample_lst"]), {}, None
    if "encoder" in networks:
        encoder_points = Points(size, inputs["encoder_sample_lst"])
        z = networks["encoder"](gather_points(x_0, encoder_points), encoder_points, inputs.get("encoder_eps"))
        if parts["encoder"]["stochastic"]:
            ours["kld"] = kl_standard_normal(z.mu, z.logvar)
            z = z.z
    x_t, target = process.training_pair(x_0, t, inputs["noise"])
    prediction = networks["model"](gather_points(x_t, points), points, process.schedule.network_time(t), z)
    loss = _LOSSES[config["diffusion"]["loss_type"]](prediction, gather_points(target, points))
    loss.mean().backward()

    ours |= {name: loss for name in ("loss", "mse", "l1")}
    ours |= {"x_t": x_t, "z": z, "mean_loss": loss.mean(), "pred_xstart": prediction}
    for name, network in networks.items():
        layout = layout_of(parts[name])
        check_gradients(vectors, name, network, layout)
        norms = [gradient.double().norm() for gradient in gradients_to_reference(network, layout).values()]
        ours[f"{name}_total_grad_norm"] = torch.stack(norms).norm()
    for name in vectors.names("out/"):
        tolerance = GRADIENTS if name.endswith("grad_norm") else OUTPUTS
        assert_close(f"out/{name}", ours[name], vectors.tensor(f"out/{name}"), tolerance)


def check_end_to_end(path: Path, vectors: Vectors, config: dict) -> None:
    unet = Vectors(path.parent / config["unet_file"])
    network = load_network(unet, unet.config, "sparse_unet")
    process = process_of(config, Prediction.MOLLIFIED_EPS).respaced(config["use_timesteps"])
    z = vectors.optional("in/z")
    for size in [head for head in vectors.heads("in/") if head != "z"]:
        white = vectors.tensor(f"in/{size}/noise")
        points = Points(tuple(white.shape[2:]))

        def predict(x: torch.Tensor, t: torch.Tensor, points: Points = points) -> torch.Tensor:
            y = points_to_image(network(image_to_points(x), points, t, z), points.size)
            return config["x_scale"] * x + config["output_scale"] * y

        with torch.no_grad():
            sample = ddim(process.denoiser(predict, clip=True), process.mollifier.noise(white), process)
        assert_close(f"out/{size}/sample", sample, vectors.tensor(f"out/{size}/sample"), END_TO_END)
        deblurred = process.mollifier.inverse(sample)
        assert_close(f"out/{size}/deblurred", deblurred, vectors.tensor(f"out/{size}/deblurred"), END_TO_END)
