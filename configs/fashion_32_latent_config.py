"""Latent model of configs/fashion_32_config.py."""

from configs.small_models import small_latent_config


def get_config():
    return small_latent_config("fashion_32")
