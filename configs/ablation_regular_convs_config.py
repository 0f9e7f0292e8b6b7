"""Table 2, "Regular Convs": full sparse convolutions instead of depthwise ones."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_regular_convs"
    config.model.depthwise_sparse = False
    return config
