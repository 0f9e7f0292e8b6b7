"""Section 5: the sparse kernel is a network of the offset, not weights resampled bilinearly."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_continuous_kernel"
    config.model.kernel = "continuous"
    return config
