"""CelebA-HQ at 64x64 (Table 1)."""

from configs.defaults import image_config
from configs.ffhq_128_config import small_model


def get_config():
    config = small_model(image_config())
    config.run.experiment = "celeba_mollified_64"
    config.data.name = "celeba"
    config.data.img_size = 64
    return config
