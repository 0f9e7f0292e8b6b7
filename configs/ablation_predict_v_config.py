"""Appendix B.2: the network predicts v."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_predict_v"
    config.diffusion.model_mean_type = "v"
    return config
