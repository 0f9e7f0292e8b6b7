"""The default `ConfigDict` of each stage; an experiment file changes only what differs."""

from dataclasses import fields

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference

from configs import schema


def _section(cls: type) -> ConfigDict:
    return ConfigDict({f.name: f.default for f in fields(cls)})


def _sections(cls: type) -> ConfigDict:
    config = ConfigDict({name: _section(section) for name, section in schema.sections(cls).items()})
    interval = FieldReference(config.train.checkpoint_steps)
    config.train.checkpoint_steps = interval
    config.train.ema_snapshot_steps = interval + 0  # follows the checkpoints until it is set itself
    return config


def image_config() -> ConfigDict:
    """Defaults of stage one (`ImageConfig`), with the derived fields following what they derive from."""
    config = _sections(schema.ImageConfig)
    height = FieldReference(config.data.img_size)
    config.data.img_size = height
    config.data.img_width = height + 0  # a new reference: follows the height until it is set itself
    ratio = FieldReference(config.mc_integral.ratio)
    config.mc_integral.ratio = ratio
    points = config.data.get_ref("img_size") * config.data.get_ref("img_width")
    config.mc_integral.q_sample = (points.to_float() * ratio).to_int()
    config.diffusion.multiscale_max_img_size = height // 2
    return config


def latent_config() -> ConfigDict:
    """Defaults of stage two (`LatentConfig`)."""
    return _sections(schema.LatentConfig)
