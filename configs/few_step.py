"""Duo on 10,033 Wikipedia paragraphs, trained long enough that its text can be judged; `few_step.sh` distils it.

    bash launch/few_step.sh
    python -m duo_jax.main --config=configs/few_step.py --workdir=runs/few_step/base

Hardware: two CPU cores, about an hour. Score to expect: held-out PPL 107 (NLL 4.674 nats/token with
--config.mode=eval --config.eval.draws=16; one draw gives 104 to 110), against 609.6 for token frequencies alone. Texts:
docs/few_step.md.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns the quickstart's recipe with four million parameters and 2,048 tokens of about three characters.

    With tokens that are nearly words, the network need not learn spelling: in bits per character, the frequencies of these
    tokens alone are as good as what the quickstart's network learns in 8,000 steps over its 300 tokens.
    """
    config = quickstart.get_config()
    config.model.dim = 192
    config.model.blocks = 6
    config.model.heads = 6
    config.model.cond_dim = 64
    config.data.bpe_size = 2_048

    config.train.steps = 6_000
    config.train.lr = 2e-3
    config.train.ema = 0.998
    config.algo.curriculum.end = 2_000

    config.eval.every = 500
    config.sample.every = 0
    config.checkpoint.every = 500
    return config
