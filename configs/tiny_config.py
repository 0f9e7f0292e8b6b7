"""Procedural functions at 32x32: the embedded default, small enough for two CPU cores and two minutes."""

from configs.defaults import image_config


def get_config():
    config = image_config()
    config.run.experiment = "tiny"
    config.data.name = "functions"
    config.data.img_size = 32
    config.data.random_flip = False  # light falls from the left in all of them
    config.train.steps = 1000
    config.train.batch_size = 16
    config.train.plot_graph_steps = 50
    config.train.plot_samples_steps = 500
    config.train.checkpoint_steps = 250
    config.train.val_loss_steps = 250
    config.train.val_images = 64
    config.train.plot_sampling_steps = "25"
    config.train.ema_update_every = 1
    config.train.ema_decay = 0.99
    config.model.nf = 32
    config.model.time_emb_dim = 64
    config.model.num_conv_blocks = 1
    config.model.uno_res = 16
    config.model.uno_base_channels = 32
    config.model.uno_mults = (1, 2, 2)
    config.model.uno_blocks_per_level = (1, 1, 1)
    config.model.uno_attn_resolutions = (8, 4)
    config.model.uno_dropout = 0.0
    config.model.z_dim = 64
    config.diffusion.model_mean_type = "xstart"  # the sharpest samples after so few steps
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    return config
