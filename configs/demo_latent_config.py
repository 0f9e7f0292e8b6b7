"""Latent model of the demo: goes on from that of weights/landscapes-32."""

from configs import landscapes_32_latent_config


def get_config():
    config = landscapes_32_latent_config.get_config()
    config.run.experiment = "demo_sampler"
    config.train.init_from = "landscapes-32"
    config.train.steps = 500
    config.train.plot_samples_steps = 500
    config.train.checkpoint_steps = 250
    config.train.calculate_test_loss_steps = 250
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = "cosine"
    return config
