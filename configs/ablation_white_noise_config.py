"""Section 3.1: white noise diffusion; without the mollifier its noise is what the network predicts."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_white_noise"
    config.diffusion.gaussian_filter_std = 0.0
    return config
