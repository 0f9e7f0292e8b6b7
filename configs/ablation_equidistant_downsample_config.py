"""Section 5: sparse downsampling by equidistant instead of random subsets."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_equidistant_downsample"
    config.model.downsampling = "equidistant"
    return config
