"""placeholder while tuning"""
from duo_jax import config as base


def get_config():
    config = base.default()
    config.model.size = "nano"
    config.model.length = 128
    config.data.tokenizer = "bpe"
    return config
