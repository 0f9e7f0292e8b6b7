"""LSUN Church at 256x256 (Table 1)."""

from configs.defaults import image_config


def get_config():
    config = image_config()
    config.run.experiment = "church_mollified_256"
    config.data.name = "churches"
    return config
