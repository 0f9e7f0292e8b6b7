"""FFHQ at 128x128: the smaller model of the ablations (Tables 2 and 3)."""

from configs.defaults import image_config


def get_config():
    config = image_config()
    config.run.experiment = "ffhq_mollified_128"
    config.data.name = "ffhq"
    return small_model(config)


def small_model(config):
    """The network of the 64 and 128 pixel experiments: a 64x64 grid, 64 channels and a latent of 256."""
    config.data.img_size = 128
    config.train.batch_size = 16
    config.train.sample_size = 16
    config.model.uno_res = 64
    config.model.uno_base_channels = 64
    config.model.uno_mults = (1, 2, 4, 8)
    config.model.uno_blocks_per_level = (2, 2, 2, 2)
    config.model.z_dim = 256
    config.optimizer.learning_rate = 1e-4
    return config
