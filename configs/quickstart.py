"""placeholder while tuning"""

from duo_jax import config as base


def get_config():
    config = base.default()
    config.model.size = "nano"
    config.model.length = 128
    config.model.dropout = 0.0
    config.data.tokenizer = "bpe"
    config.train.steps = 200
    config.train.batch_size = 32
    config.train.log_every = 20
    config.train.warmup = 100
    config.train.lr = 1e-3
    config.train.ema = 0.99
    config.eval.every = 100
    config.eval.batch_size = 32
    config.checkpoint.every = 50
    config.sample.every = 100
    config.sample.n_steps = 32
    return config
