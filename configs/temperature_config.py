"""Maps of air temperature on 37x49 points, 240 of one model: E1_north_america.nc of the package iris-sample-data."""

from configs.small_models import small_field_config


def get_config():
    config = small_field_config("temperature", 32)  # the U-Net works on a grid of 16x16
    config.data.img_size, config.data.img_width = 37, 49
    config.data.channels = 1
    config.data.anomalies = True  # one year differs from another by a tenth of what places differ by
    config.data.val_ratio = 0.1
    config.data.origin = "lower"  # the first row is the south
    config.data.random_flip = False  # west must stay west
    return config
