"""Fashion-MNIST, padded to 32x32: data.root_dir is an .npz file of it or torchvision's folder."""

from configs.small_models import small_image_config


def get_config():
    config = small_image_config("fashion_32", 32)
    config.data.name = "fashion_mnist"
    config.data.channels = 1
    config.data.random_flip = False  # shoes point to the left in all of them
    return config
