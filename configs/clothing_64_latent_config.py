"""Latent model of configs/clothing_64_config.py."""

from configs.small_models import small_latent_config


def get_config():
    return small_latent_config("clothing_64", 512)
