"""Heat before and after some time, two channels on 32x32 points: fields that examples/heat_fields.py writes."""

from configs.small_models import small_field_config


def get_config():
    config = small_field_config("heat", 32)
    config.data.root_dir = "heat.npz"
    config.data.fields = "before, after"
    config.data.channels = 2
    config.train.steps = 8000
    return config
