"""Distils the Duo of configs/few_step.py to a few steps on two CPU cores.

    bash launch/few_step.sh
    python -m duo_jax.main --config=configs/quickstart_distill.py --config.init_from=runs/few_step/base \
        --workdir=runs/few_step/distilled

Hardware: two CPU cores, twenty minutes. Score to expect, with SmolLM2-135M as the judge and a greedy tail: perplexity
1,175 in 4 steps and 1,042 in 8; the network that it starts from has 2,023 in 4, 1,629 in 8 and 1,459 in 64 steps
(docs/few_step.md).
"""

from ml_collections import ConfigDict

from configs import few_step


def get_config() -> ConfigDict:
    """Returns five rounds of 300 steps, over which dt goes from 1/128 to 1/8."""
    config = few_step.get_config()
    config.algo.name = "dcd"
    # A wider range than in training: few steps go from pure noise to clean text.
    config.algo.alpha_max, config.algo.alpha_min = 0.995, 0.005
    config.algo.distillation.n_steps = 128
    config.algo.distillation.round_length = 300
    config.train.steps = 1_500
    config.train.lr = 5e-4
    config.train.warmup = 50
    config.train.ema = 0.99
    config.eval.every = 300
    config.checkpoint.every = 300
    config.checkpoint.keep = 5  # one per round, so that each round's network can be sampled and judged
    config.sample.n_steps = 8
    config.sample.noise_removal = "greedy"
    return config
