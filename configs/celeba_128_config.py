"""CelebA-HQ at 128x128 (Table 1)."""

from configs.defaults import image_config
from configs.ffhq_128_config import small_model


def get_config():
    config = small_model(image_config())
    config.run.experiment = "celeba_mollified_128"
    config.data.name = "celeba"
    config.data.img_size = 128
    return config
