"""Table 2, "Quasi Monte Carlo": points of a low-discrepancy sequence instead of independent ones."""

from configs import ffhq_128_config


def get_config():
    config = ffhq_128_config.get_config()
    config.run.experiment = "ablation_quasi_monte_carlo"
    config.mc_integral.type = "halton"
    return config
