"""CelebA-HQ at 256x256."""

from configs.defaults import image_config


def get_config():
    config = image_config()
    config.run.experiment = "celeba_mollified_256"
    config.data.name = "celeba"
    return config
