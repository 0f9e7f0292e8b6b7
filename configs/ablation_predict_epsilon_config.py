"""Eq. (43): the network predicts the noise before the mollifier."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_predict_epsilon"
    config.diffusion.model_mean_type = "epsilon"
    return config
