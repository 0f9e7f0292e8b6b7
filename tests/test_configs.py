"""Configurations: every file is valid, every fault is named, derived fields follow, command lines are read."""

import dataclasses
import json
import subprocess
import sys

import pytest

from configs.defaults import image_config, latent_config
from configs.schema import ImageConfig, LatentConfig
from configs.validate import ConfigError, freeze
from forked import ROOT, run
from runtime.overrides import apply_overrides, load_config
from runtime.stored import config_from, differences, relocate

FILES = sorted(ROOT.glob("configs/*_config.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_is_valid_and_typed(file):
    stage = LatentConfig if "latent" in file.stem else ImageConfig
    config = freeze(load_config(str(file)), stage)
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            assert type(getattr(values, field.name)) is field.type
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1


def test_expected_files_exist():
    names = {file.stem.removesuffix("_config") for file in FILES}
    assert names >= {"ffhq_128", "ffhq_256", "celeba_64", "celeba_128", "celeba_256", "churches_256", "tiny",
                     "ffhq_latent", "celeba_latent", "churches_latent", "tiny_latent"}  # fmt: skip


def test_paper_defaults():
    """Section 3 of the specification of the 256 models, and the authors' latent model."""
    config = freeze(load_config(str(ROOT / "configs/ffhq_256_config.py")))
    model = config.model
    assert (model.nf, model.kernel_size, model.num_conv_blocks, model.knn_neighbours) == (64, 7, 3, 3)
    assert (model.uno_res, model.uno_base_channels, model.uno_mults) == (128, 128, (1, 2, 4, 8, 8))
    assert (model.z_dim, model.uno_dropout, config.mc_integral.q_sample) == (1024, 0.1, 256 * 256 // 4)
    assert (config.train.batch_size, config.train.ema_decay, config.train.ema_update_every) == (32, 0.995, 10)
    assert (config.optimizer.learning_rate, config.optimizer.adam_beta2) == (5e-5, 0.99)
    latent = freeze(latent_config(), LatentConfig)
    assert (latent.model.num_layers, latent.model.hid_channels, latent.train.batch_size) == (10, 2048, 256)
    assert (latent.diffusion.loss_type, latent.diffusion.noise_schedule) == ("l1", "const0.008")


def test_derived_fields_follow_until_set():
    config = image_config().lock()
    assert not apply_overrides(config, [("data.img_size", "64")])
    frozen = freeze(config)
    assert (frozen.size, frozen.mc_integral.q_sample) == ((64, 64), 1024)
    assert frozen.diffusion.multiscale_max_img_size == 32
    assert not apply_overrides(config, [("data.img_width", "96"), ("mc_integral.ratio", "0.5")])
    assert freeze(config).size == (64, 96)
    assert freeze(config).mc_integral.q_sample == 64 * 96 // 2
    assert not apply_overrides(config, [("mc_integral.q_sample", "100")])
    assert freeze(config).mc_integral.q_sample == 100


@pytest.mark.parametrize(("path", "text", "value"), [
    ("train.steps", "7", 7),
    ("optimizer.learning_rate", "1e-3", 1e-3),
    ("optimizer.gradient_skip_threshold", "5", 5.0),
    ("train.amp", "false", False),
    ("model.uno_mults", "(1,2)", (1, 2)),
    ("model.uno_mults", "[1, 2]", (1, 2)),
    ("data.root_dir", "a path=with signs", "a path=with signs"),
])  # fmt: skip
def test_overrides_are_typed(path, text, value):
    config = image_config().lock()
    assert not apply_overrides(config, [(path, text)])
    section, key = path.split(".")
    assert config[section][key] == value


@pytest.mark.parametrize(("path", "value", "part"), [
    ("data.name", "fhq", "did you mean ffhq?"),
    ("data.img_size", 2, "accepted: int 4 to 65536"),
    ("data.channels", 2, "accepted: 1, 3, 4"),
    ("train.ema_decay", 1.5, "accepted: float 0.0 to 1.0"),
    ("model.kernel_size", 4, "odd numbers from 1 on"),
    ("model.uno_res", 100, "a multiple of 16"),
    ("model.uno_blocks_per_level", (2, 2), "5 entries"),
    ("model.uno_mults", (1, 0, 2, 2, 2), "integers from 1 to 1000"),
    ("mc_integral.q_sample", 2, "3 (model.knn_neighbours) to 65536"),
    ("mc_integral.q_sample", 65537, "3 (model.knn_neighbours) to 65536"),
    ("diffusion.noise_schedule", "cosin", "const<beta>"),
    ("diffusion.noise_schedule", "const2", "in (0, 1)"),
    ("run.experiment", "a/b", "without slashes"),
    ("optimizer.learning_rate", 0.0, "> 0"),
    ("optimizer.gradient_skip_threshold", float("inf"), "a finite number"),
    ("diffusion.gaussian_filter_std", float("nan"), "a finite number"),
    ("optimizer.max_nonfinite_steps", 0, "accepted: int 1 to 1000000000"),
])  # fmt: skip
def test_a_wrong_value_is_one_line(path, value, part):
    config = image_config()
    section, key = path.split(".")
    config[section][key] = value
    with pytest.raises(ConfigError) as error:
        freeze(config)
    (fault,) = (f for f in error.value.faults if path in f)
    assert fault.startswith(f"config.{path} is {value!r}") and "; accepted: " in fault and part in fault


def test_all_faults_at_once():
    config = image_config()
    config.train.batch_size = 0
    config.model.nf = -1
    config.model.extra = 1
    with pytest.raises(ConfigError) as error:
        freeze(config)
    assert len(error.value.faults) == 3


def test_stored_configuration_round_trip():
    config = freeze(image_config())
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from(plain, ImageConfig, "here") == config
    del plain["model"]["attention"]  # a field added since
    assert config_from(plain, ImageConfig, "here") == config
    plain["data"]["fid_samples"] = 3  # a field that is gone
    assert config_from(plain, ImageConfig, "here") == config
    plain["model"]["nf"] = 0
    with pytest.raises(ValueError, match=r"here: .*config.model.nf"):
        config_from(plain, ImageConfig, "here")


def test_what_a_later_command_may_change():
    config = freeze(image_config())
    plain = dataclasses.asdict(config)
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, root_dir="elsewhere"),
                                train=dataclasses.replace(config.train, steps=5))  # fmt: skip
    assert differences(plain, dataclasses.asdict(moved)) == []
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, nf=32))
    assert differences(plain, dataclasses.asdict(wider)) == ["model.nf is 64 there, 32 here"]
    assert relocate(config, moved, ["data.root_dir"], "run").data.root_dir == "elsewhere"
    assert relocate(config, wider, [], "run") == config
    precise = dataclasses.replace(config, train=dataclasses.replace(config.train, amp=False))
    assert relocate(config, precise, ["train.amp"], "run").train.amp is False
    other = dataclasses.replace(wider, mc_integral=dataclasses.replace(wider.mc_integral, ratio=0.5))
    with pytest.raises(ConfigError) as refused:
        relocate(config, other, ["model.nf", "data.root_dir", "mc_integral.ratio"], "run")
    assert refused.value.faults == [
        "model.nf is 32, but run was trained with 64; accepted: that value, or none",
        "mc_integral.ratio is 0.5, but run was trained with 0.25; accepted: that value, or none",
    ]
    here = dataclasses.replace(config, run=dataclasses.replace(config.run, device="cpu", root_dir="there", seed=3))
    assert relocate(config, here, [], "run").run == dataclasses.replace(here.run, seed=0)


def test_a_wrong_command_line_names_every_fault():
    done = run(["train_inf_ae_diffusion.py", "--config=configs/tiny_config.py", "--config.train.batch_siz=1",
                   "--config.trian.steps=1", "--config.train.steps=x", "--config.data.name=fhq"])  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    for part in ("did you mean batch_size?", "did you mean train?", "accepted: int", "did you mean ffhq?"):
        assert part in done.stderr


@pytest.mark.parametrize(("arguments", "part"), [
    ([], "--config: missing"),
    (["--config=configs/tiny_latent_config.py"], "holds LatentConfig; accepted: ImageConfig"),
    (["--config=configs/tiny_confg.py"], "did you mean configs/tiny_config.py?"),
    (["--config=configs/tiny_config.py", "--batch=3"], "batch"),
    (["--config=configs/tiny_config.py", "word"], "'word'"),
    (["--config=README.md"], "--config=README.md"),
])  # fmt: skip
def test_wrong_flags_and_files(arguments, part):
    done = run(["train_inf_ae_diffusion.py", *arguments])
    assert done.returncode == 2 and "Traceback" not in done.stderr and part in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_shows_the_flags_of_the_command():
    done = run(["experiments/generate_samples.py", "--help"])
    assert done.returncode == 0
    for part in ("--sample_img_size", "--config: LatentConfig file", "python experiments/generate", "--helpfull",
                 "--eta: noise of DDIM (default 0.0)"):  # fmt: skip
        assert part in done.stdout
    assert "train.batch_size" not in done.stdout and len(done.stdout.splitlines()) < 50


def test_full_help_shows_every_field_as_the_given_file_has_it():
    done = run(["train_inf_ae_diffusion.py", "--config=configs/tiny_config.py", "--config.model.nf=40", "--helpfull"])
    assert done.returncode == 0, done.stderr
    lines = dict(
        line.strip().split(": ", 1) for line in done.stdout.splitlines() if line.startswith("  ") and ": " in line
    )
    for section in dataclasses.fields(ImageConfig):
        for field in dataclasses.fields(section.type):
            assert f"{section.name}.{field.name}" in lines
    assert lines["train.steps"].endswith("(default 1000)") and lines["model.nf"].endswith("(default 40)")
    assert lines["mc_integral.q_sample"].endswith("(default 256)")  # a quarter of 32x32, derived
    assert (
        "one of cosine" not in lines["optimizer.schedule"] and "one of constant, cosine" in lines["optimizer.schedule"]
    )


def test_a_reader_of_the_help_may_leave():
    process = subprocess.Popen([sys.executable, "train_inf_ae_diffusion.py", "--helpfull"], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
