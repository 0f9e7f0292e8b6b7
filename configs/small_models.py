"""What the models that a CPU trains in hours have in common: at 32×32 up to 3 M parameters in both stages together, at
64×64 up to 8 M."""

from ml_collections import ConfigDict

from configs.defaults import image_config, latent_config


def small_image_config(name: str, size: int) -> ConfigDict:
    """Stage one of a model called `name` at size×size, 32 or 64: the U-Net works on a grid of half the side."""
    config = image_config()
    config.run.experiment = name
    config.data.img_size = size
    config.train.steps = 30_000
    config.train.batch_size = 32
    config.train.plot_graph_steps = 50
    config.train.plot_samples_steps = 2500
    config.train.plot_sampling_steps = "25"
    config.train.checkpoint_steps = 500
    config.train.val_loss_steps = 500
    config.train.ema_update_every = 1
    config.train.ema_decay = 0.999
    config.model.nf = 32
    config.model.time_emb_dim = 128
    config.model.num_conv_blocks = 2
    config.model.uno_res = size // 2
    config.model.uno_base_channels = 32
    config.model.uno_mults = (1, 2, 3) if size == 32 else (1, 2, 3, 4)
    config.model.uno_blocks_per_level = (1,) * len(config.model.uno_mults)
    config.model.uno_attn_resolutions = (4,) if size == 32 else (8,)
    config.model.uno_dropout = 0.0
    config.model.z_dim = 64 if size == 32 else 128
    config.diffusion.model_mean_type = "xstart"
    config.diffusion.loss_weight = "min_snr"
    config.diffusion.gaussian_filter_std = 0.5  # one pixel hides more of so small an image than the network finds again
    config.mc_integral.ratio = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    return config


def small_field_config(name: str, size: int) -> ConfigDict:
    """Stage one of a model of fields that a CPU trains in minutes; the U-Net works on a grid of size/2 × size/2."""
    config = small_image_config(name, size)
    config.data.name = "fields"
    config.train.steps = 3000
    config.train.batch_size = 16
    config.train.plot_samples_steps = 3000
    config.model.nf = 16
    config.model.uno_base_channels = 24
    # Few fields: without a KL term latents would name single fields. What they do not say has no spread to lose.
    config.model.z_dim = 8
    config.model.stochastic_encoding = True
    config.model.kld_weight = 1e-3
    # Deviations of fields are a fifth of their range or less, so the noise that hides their finer waves is faint.
    config.diffusion.min_snr_gamma = 1000.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    return config


def small_latent_config(name: str, width: int = 256) -> ConfigDict:
    """Stage two of the model called `name`, of hidden width `width`."""
    config = latent_config()
    config.run.experiment = f"{name}_sampler"
    config.train.steps = 30_000
    config.train.batch_size = 128
    config.train.plot_graph_steps = 100
    config.train.plot_samples_steps = 10_000
    config.train.plot_sampling_steps = "25"
    config.train.checkpoint_steps = 1000
    config.train.calculate_test_loss_steps = 1000
    config.train.test_loss_repeats = 1
    config.train.ema_update_every = 1
    config.train.ema_decay = 0.999
    config.model.hid_channels = width
    config.model.num_layers = 6
    config.model.time_embed_dim = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    return config
