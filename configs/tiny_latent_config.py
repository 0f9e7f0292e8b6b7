"""Latent model of the embedded default."""

from configs.defaults import latent_config


def get_config():
    config = latent_config()
    config.run.experiment = "tiny_sampler"
    config.train.steps = 1500
    config.train.batch_size = 128
    config.train.plot_graph_steps = 100
    config.train.plot_samples_steps = 1500
    config.train.checkpoint_steps = 500
    config.train.calculate_test_loss_steps = 500
    config.train.plot_sampling_steps = "25"
    config.train.ema_update_every = 1
    config.train.ema_decay = 0.99
    config.model.hid_channels = 256
    config.model.num_layers = 6
    config.model.time_embed_dim = 64
    config.optimizer.learning_rate = 1e-3
    return config
