"""The quick part of the battery: every field in this process, and of the rest one line in many as users type it."""

import dataclasses

import pytest

import micro
from configs.defaults import image_config, latent_config
from configs.schema import ImageConfig, LatentConfig, sections
from configs.validate import ConfigError, freeze
from faults import battery, lines
from runtime.overrides import apply_overrides


@pytest.mark.parametrize("stage", [ImageConfig, LatentConfig])
def test_every_number_has_a_finite_range(stage):
    for section, cls in sections(stage).items():
        for spec in dataclasses.fields(cls):
            low, high = spec.metadata["low"], spec.metadata["high"]
            if spec.type in (int, float, tuple) and not spec.metadata["choices"]:
                assert low is not None and high is not None and 0 <= low < high < 2**63, f"{section}.{spec.name}"


@pytest.mark.parametrize(("stage", "default"), [(ImageConfig, image_config), (LatentConfig, latent_config)])
def test_no_field_takes_a_number_out_of_its_range(stage, default):
    for argument in lines.field_faults(stage, "config"):
        path, _, text = argument.removeprefix("--config.").partition("=")
        config = default()
        faults = apply_overrides(config, [(path, text)])
        if not faults:
            with pytest.raises(ConfigError) as error:
                freeze(config, stage)
            faults = error.value.faults
        assert len(faults) == 1 and faults[0].lstrip("-").startswith(f"config.{path} is "), faults


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("battery")


@pytest.mark.parametrize("kind", battery.KINDS)
def test_some_of_each_kind_are_survived(kind, scratch):
    tried = list(battery.attempts(kind, scratch, battery.EVERY[kind]))
    assert tried and not [(number, name, fault) for number, name, fault in tried if fault]


@pytest.mark.parametrize(("path", "value", "part"), [
    ("mc_integral.ratio", "0.5", "q_sample=100 decides"),
    ("data.root_dir", "photos", "with data.name=folder"),
    ("optimizer.gradient_skip_threshold", "9.0", "with optimizer.gradient_skip=True"),
    ("diffusion.min_snr_gamma", "2.0", "with diffusion.loss_weight=min_snr"),
])  # fmt: skip
def test_what_would_have_no_effect_is_refused(path, value, part, tmp_path):
    fields = micro.overrides(tmp_path, {**micro.IMAGE, "mc_integral.q_sample": 100, path: value})
    line = ["train_inf_ae_diffusion.py", "--config=configs/tiny_config.py", *micro.arguments("config", fields)]
    done = lines.run(line)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert f"--config.{path} is " in done.stderr and part in done.stderr and not list(tmp_path.iterdir())
