"""Duo on LM1B (One Billion Words), packed rows of 128 tokens.

    python -m duo_jax.main --config=configs/lm1b.py --workdir=runs/lm1b
    python -m duo_jax.main --config=configs/lm1b.py --workdir=runs/lm1b-padded --config.data.packing=padded

Needs the text: `pip install -e .[hub]` and the data set's download, or a local copy at --config.data.path.
Hardware: the paper used 8 H100. Score to expect after 1M steps: held-out PPL 33.7 packed and 29.9 padded (one sentence a
row), as published; not run here.
"""

from ml_collections import ConfigDict

from duo_jax import config as base


def get_config() -> ConfigDict:
    """Returns the recipe of `default()` with LM1B's text, tokenizer and length."""
    config = base.default()
    config.model.length = 128
    # For BERT's 30,522 ids, gamma from -3.5 to -1.75, the paper's range; for other tokenizers, the same range of alpha.
    config.algo.alpha_max, config.algo.alpha_min = 0.94171, 0.048683
    config.data.source = "lm1b"
    config.data.tokenizer = "bert-base-uncased"
    return config
