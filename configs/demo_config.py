"""The demo: goes on from weights/landscapes-32 for some hundred steps, at a rate that falls from a low one to 0."""

from configs import landscapes_32_config


def get_config():
    config = landscapes_32_config.get_config()
    config.run.experiment = "demo"
    config.data.num_images = 2000
    config.train.init_from = "landscapes-32"
    config.train.steps = 100
    config.train.plot_graph_steps = 10
    config.train.plot_samples_steps = 100
    config.train.checkpoint_steps = 50
    config.train.val_loss_steps = 50
    config.train.val_images = 64
    config.mc_integral.ratio = 1.0  # as at the end of its training
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "cosine"
    return config
