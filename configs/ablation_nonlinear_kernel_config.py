"""Table 2, "Nonlinear Kernel": conv, activation, conv in place of the sparse convolution."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_nonlinear_kernel"
    config.model.kernel = "nonlinear"
    return config
