"""Photographs of garments in a folder, zip or tar at 64x64: data.root_dir says where."""

from configs.small_models import small_image_config


def get_config():
    config = small_image_config("clothing_64", 64)
    config.data.name = "folder"
    config.data.val_ratio = 0.1
    return config
