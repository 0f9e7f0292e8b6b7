"""Latent model of the LSUN Church encoder: twice as deep as the others."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.experiment = "church_mollified_256_sampler"
    config.model.num_layers = 20
    return config
