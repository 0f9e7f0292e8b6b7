"""Latent model of configs/temperature_config.py."""

from configs.small_models import small_latent_config


def get_config():
    config = small_latent_config("temperature")
    config.train.steps = 3000  # latents of fields say little
    return config
