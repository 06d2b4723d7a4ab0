"""Helpers of these tests: a small text, and a config block for it."""

import os

import numpy as np
from ml_collections import ConfigDict

SENTENCE = "the a cat dog sees runs over under small old red house river and then slowly naïve 北京 😀 12 7 , ."
WORDS = SENTENCE.split()


def make_texts(count, seed=0):
    """Documents of 3 to 59 words drawn from a few."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 60))) for _ in range(count)]


def data_config(directory, **values):
    """A `config.data` block whose shards go to a folder of `directory`."""
    default = {"source": "text", "path": "", "field": "text", "tokenizer": "bpe", "bpe_size": 300}
    return ConfigDict(default | {"dir": str(directory / "shards"), "packing": "packed", "workers": 0} | values)


def process_and_backends(batch):
    """Replaces a batch by the number of the process that made it and of the JAX backends that it has started."""
    from jax._src import xla_bridge

    return {"process": np.array(os.getpid()), "backends": np.array(len(xla_bridge._backends))}
