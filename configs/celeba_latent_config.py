"""Latent model of the CelebA-HQ encoders."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.experiment = "celeba_mollified_256_sampler"
    return config
