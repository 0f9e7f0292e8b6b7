"""Latent model of configs/heat_config.py."""

from configs.small_models import small_latent_config


def get_config():
    config = small_latent_config("heat")
    config.train.steps = 3000  # latents of fields say little
    return config
