"""Latent model of the FFHQ encoders."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.experiment = "ffhq_mollified_256_sampler"
    return config
