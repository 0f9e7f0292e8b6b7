"""Eq. (36): the network predicts the clean function."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_predict_x0"
    config.diffusion.model_mean_type = "xstart"
    config.diffusion.final_estimate = "filter"  # as the paper finds its images
    return config
