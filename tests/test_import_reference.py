"""Checkpoints of the authors' code as runs: against numbers of their networks, through commands, and wrong input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import micro
from configs.schema import ImageConfig, LatentConfig
from diffusion.coordinates import Points, gather_points
from diffusion.losses import mse
from infty_diff.latent_prior import LatentPrior
from infty_diff.model import InftyDiff
from infty_diff.reference_runs import read_image_run, read_latent_run, write_runs
from models.reference_weights import LAYOUTS
from parity_vectors import OUTPUTS, Vectors, assert_close
from reference_files import COMMAND, SQUARE, checkpoint, image_arguments, latent_arguments, write_theirs
from runtime.stored import config_from
from runtime.weights import load_weights
from test_commands import fails, run
from test_parity import FOLDER


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    return write_theirs(tmp_path_factory.mktemp("theirs"))


def expected(theirs: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(theirs / "expected.pt", weights_only=True)


def holds(tensors: dict[str, torch.Tensor], prefix: str, state: dict[str, torch.Tensor]) -> bool:
    held = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return set(held) == set(state) and all(torch.equal(held[name], value) for name, value in state.items())


def test_imported_pair_is_sampled_and_not_trained_over(theirs, tmp_path):
    done = run([COMMAND, *image_arguments(tmp_path, theirs / "image"), *latent_arguments(tmp_path, theirs / "latent")])
    assert done.returncode == 0, done.stderr
    for said in ("step 20000 of checkpoint.pkl", "denoiser: their average", "encoder: the last step", "mean 0",
                 "coordinate_convention=reference", "encoder_block_norm=false"):  # fmt: skip
        assert said in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"image", "sampler"}
    for name, section in (("image", "model"), ("sampler", "diffusion")):
        assert {path.name for path in (tmp_path / name).iterdir()} == {"config.json", "weights.safetensors"}
        _, header = load_weights(tmp_path / name / "weights.safetensors")
        assert json.loads((tmp_path / name / "config.json").read_text())[section] == header["config"][section]
    assert set(header["imported"]) == {"latent_checkpoint.pkl", "latents.pkl"} and header["step"] == 500

    place = {"run.root_dir": tmp_path, "run.experiment": "image"}
    prior = {"run.root_dir": tmp_path, "run.experiment": "sampler", "run.device": "cpu"}
    models = ["--config", "configs/tiny_latent_config.py", *micro.arguments("config", prior),
              "--decoder_config", "configs/tiny_config.py", *micro.arguments("decoder_config", place)]  # fmt: skip
    done = run(["experiments/generate_samples.py", *models, "--seeds=1,3", "--sample_img_size=20x24",
                "--sampling_steps=3", "--latent_sampling_steps=5"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "sampler" / "samples" / "20x24_ddim3_latent5"
    model = InftyDiff.from_runs(tmp_path / "image", tmp_path / "sampler", "cpu")
    assert np.array(Image.open(folder / "000003.png")).shape == (20, 24, 3)
    assert model.config.model.coordinate_convention == "reference" and not model.config.model.encoder_block_norm

    # After a kill between the two, the same command makes the other.
    latent = [COMMAND, *image_arguments(tmp_path, theirs / "image"), *latent_arguments(tmp_path, theirs / "latent")]
    shutil.move(tmp_path / "sampler" / "weights.safetensors", tmp_path / "kept")
    shutil.rmtree(tmp_path / "sampler")
    fails([*latent, "--config.data.seed=1"], "image exists; accepted: another run.experiment")
    assert run(latent).returncode == 0
    assert (tmp_path / "sampler" / "weights.safetensors").read_bytes() == (tmp_path / "kept").read_bytes()

    # An imported run has no training state: training in its folder would replace it.
    weights = tmp_path / "sampler" / "weights.safetensors"
    before = weights.read_bytes()
    fields = micro.overrides(tmp_path, micro.LATENT, {"run.experiment": "sampler"})
    training = ["train_latent_diffusion.py", "--config", "configs/tiny_latent_config.py",
                *micro.arguments("config", fields), *models[models.index("--decoder_config"):]]  # fmt: skip
    fails(training, "would be overwritten")
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("weights", "step", "source"),
    [
        ("auto", 20_000, "averaged"),
        ("auto", 10_000, "last"),
        ("averaged", 10_000, "averaged"),
        ("last", 20_000, "last"),
    ],
)
def test_which_weights_are_taken(theirs, tmp_path, weights, step, source):
    """0.995^(step/10) of their average is another network: 0.665 % at 10 000 steps, 0.004 % at 20 000."""
    path = tmp_path / "checkpoint.pkl"
    held = torch.load(theirs / "image" / "checkpoint.pkl", weights_only=True)
    torch.save({**held, "global_step": step}, path)
    imported = read_image_run(path, micro.image(tmp_path, SQUARE), weights)
    states = expected(theirs)
    assert holds(imported.tensors, "denoiser.", states[source])
    assert holds(imported.tensors, "encoder.", states["encoder"])
    part = {10_000: "0.665 %", 20_000: "0.004 %"}[step]
    assert imported.step == step and part in " ".join(imported.notes)


def test_old_files_and_the_latent_statistics_of_a_stochastic_encoder(theirs, tmp_path):
    held = torch.load(theirs / "latent" / "latent_checkpoint.pkl", weights_only=True)
    path = tmp_path / "best_latent_checkpoint.pkl"
    torch.save(held, path, _use_new_zipfile_serialization=False)
    mean, std = torch.full((1, 6), 0.25), torch.full((1, 6), 3.0)
    torch.save((*(torch.randn(5, 6) for _ in range(4)), mean, std), tmp_path / "latents.pkl")
    imported = read_latent_run(path, None, micro.latent(tmp_path))
    assert holds(imported.tensors, "latent_model.", expected(theirs)["prior"])
    assert torch.equal(imported.tensors["mean"], mean[0].double())
    assert torch.equal(imported.tensors["std"], std[0].double())
    other = read_latent_run(path, theirs / "latent" / "latents.pkl", micro.latent(tmp_path))
    assert torch.equal(other.tensors["std"], torch.linspace(0.5, 2, 6).half().double())
    assert not other.tensors["mean"].any()


needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no parity vectors in {FOLDER}")


def their_config(root: Path, unet: dict, encoder: dict, diffusion: dict) -> ImageConfig:
    """Our configuration for the one of a stored training step."""
    fields = {
        "data.img_size": unet["img_size"], "data.img_width": unet["img_size"], "model.nf": unet["nf"],
        "model.time_emb_dim": unet["time_emb_dim"], "model.num_conv_blocks": unet["num_conv_blocks"],
        "model.kernel_size": unet["kernel_size"], "model.depthwise_sparse": unet["depthwise_sparse"],
        "model.knn_neighbours": unet["knn_neighbours"], "model.uno_res": unet["uno_res"],
        "model.uno_base_channels": unet["uno_base_nf"], "model.uno_mults": tuple(unet["uno_mults"]),
        "model.uno_blocks_per_level": tuple(unet["blocks_per_level"]),
        "model.uno_attn_resolutions": tuple(unet["attn_res"]), "model.z_dim": unet["z_dim"],
        "model.stochastic_encoding": encoder["stochastic"], "diffusion.noise_schedule": diffusion["schedule"],
        "diffusion.gaussian_filter_std": diffusion["gaussian_filter_std"], "diffusion.steps": diffusion["steps"],
    }  # fmt: skip
    return micro.image(root, fields)


@needs_vectors
@pytest.mark.parametrize("name", ["train_step_ts", "train_step_td"])
def test_imported_autoencoder_computes_what_theirs_did(tmp_path, name):
    """Latents and the loss of a joint training step, from a run on disk whose weights came under their names."""
    vectors = Vectors(FOLDER / f"{name}.npz")
    unet, encoder, diffusion = (vectors.config[part] for part in ("unet", "encoder", "diffusion"))
    model = vectors.tensors("param/model/")
    other = {key: torch.zeros_like(value) if "uno_coords" not in key else value for key, value in model.items()}
    torch.save(checkpoint(30_000, other, model, vectors.tensors("param/encoder/")), tmp_path / "checkpoint.pkl")
    write_runs([read_image_run(tmp_path, their_config(tmp_path, unet, encoder, diffusion))])
    ours = InftyDiff.from_runs(tmp_path / "micro", device="cpu")
    assert ours.config.model.encoder_block_norm == (LAYOUTS[unet["backend"]] == "td")

    inputs = vectors.tensors("in/")
    x_0, size = inputs["x_start"], ours.config.size
    points, encoded = Points(size, inputs["sample_lst"]), Points(size, inputs["encoder_sample_lst"])
    if encoder["stochastic"]:
        mu, logvar = ours.encode_distribution(x_0, encoded)
        z = mu + (logvar / 2).exp() * inputs["encoder_eps"]
    else:
        z = ours.encode(x_0, encoded)
    assert_close("z", z, vectors.tensor("out/z"), OUTPUTS)
    x_t, target = ours.process.training_pair(x_0, inputs["t"], inputs["noise"])
    with torch.no_grad():
        time = ours.process.schedule.network_time(inputs["t"])
        prediction = ours.denoiser(gather_points(x_t, points), points, time, z)
    assert_close("loss", mse(prediction, gather_points(target, points)), vectors.tensor("out/loss"), OUTPUTS)


@needs_vectors
def test_imported_latent_model_computes_what_theirs_did(tmp_path):
    vectors = Vectors(FOLDER / "mlp_skip_net.npz")
    theirs, state = vectors.config, vectors.tensors("param/")
    torch.save(checkpoint(10, {}, state), tmp_path / "latent_checkpoint.pkl")
    std = torch.rand(1, theirs["channels"]) + 0.5
    torch.save((torch.randn(9, theirs["channels"]),) * 2 + (0 * std, std), tmp_path / "latents.pkl")
    fields = {"model.hid_channels": theirs["hid_channels"], "model.num_layers": theirs["num_layers"],
              "model.time_embed_dim": theirs["time_emb_channels"]}  # fmt: skip
    write_runs([read_latent_run(tmp_path, None, micro.latent(tmp_path, fields))])
    tensors, header = load_weights(tmp_path / "micro_sampler" / "weights.safetensors")
    prior = LatentPrior.from_tensors(config_from(header["config"], LatentConfig, ""), tensors, torch.device("cpu"))
    with torch.no_grad():
        y = prior.model(vectors.tensor("in/x"), vectors.tensor("in/t"))
    assert_close("y", y, vectors.tensor("out/y"), OUTPUTS)
    torch.testing.assert_close(prior.unnormalise(torch.ones(1, prior.dim)), std)


def test_help_says_how():
    done = run([COMMAND, "--help"])
    assert done.returncode == 0
    for said in ("--latent_checkpoint", "latents.pkl", "--weights_from", "--helpfull", "generate_samples"):
        assert said in done.stdout
