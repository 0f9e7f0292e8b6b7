"""Latent model of configs/ffhq_64_config.py."""

from configs.small_models import small_latent_config


def get_config():
    return small_latent_config("ffhq_64", 512)
