"""FFHQ, or the first few thousand images of it, at 64x64: the last of them by number are held out."""

from configs.small_models import small_image_config


def get_config():
    config = small_image_config("ffhq_64", 64)
    config.data.name = "ffhq"
    config.data.split = "authors"
    config.data.val_ratio = 0.1123
    return config
