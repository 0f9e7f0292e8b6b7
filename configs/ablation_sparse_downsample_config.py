"""Table 2, "Sparse Downsample": the U-Net halves random subsets of the points instead of a grid."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_sparse_downsample"
    config.model.downsampling = "random"
    return config
