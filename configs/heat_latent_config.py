"""Latent model of configs/heat_config.py."""

from configs.small_models import small_latent_config


def get_config():
    return small_latent_config("heat")
