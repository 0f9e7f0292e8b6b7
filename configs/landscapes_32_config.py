"""Procedural landscapes at 32x32: no data needed, two CPU cores and some hours."""

from configs.small_models import small_image_config


def get_config():
    config = small_image_config("landscapes_32", 32)
    config.data.name = "functions"
    config.data.num_images = 50_000
    config.data.random_flip = False  # light falls from the left in all of them
    config.model.uno_res = 32  # on a grid of half the side the furrows, 4 pixels from one to the next, are lost
    config.model.uno_attn_resolutions = (8,)
    config.model.encoder_texture = (16, 1)  # furrows are faint beside the colours, and fill the lowest rows alone
    return config
