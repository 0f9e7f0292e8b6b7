"""Appendix A: Fourier layers instead of convolutions in the U-Net on the grid."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_fourier_grid"
    config.model.uno_conv_type = "spectral"
    return config
