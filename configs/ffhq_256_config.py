"""FFHQ at 256x256: the paper's main model (Table 1)."""

from configs.defaults import image_config


def get_config():
    config = image_config()
    config.run.experiment = "ffhq_mollified_256"
    config.data.name = "ffhq"
    return config
