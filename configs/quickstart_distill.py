"""Distils configs/quickstart.py's Duo to a few steps on two CPU cores.

    bash launch/few_step.sh
    python -m duo_jax.main --config=configs/quickstart_distill.py --config.init_from=runs/quickstart --workdir=runs/distilled

Hardware: two CPU cores. What came out: docs/few_step.md.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Returns five rounds of 500 steps, over which dt goes from 1/256 to 1/16.

    Longer steps undo the network: with rounds up to dt = 1/4 its held-out perplexity went from 16 to 58.
    """
    config = quickstart.get_config()
    config.algo.name = "dcd"
    # Wider than in training: few steps begin in pure noise and end in clean text.
    config.algo.alpha_max, config.algo.alpha_min = 0.995, 0.005
    config.algo.distillation.n_steps = 256
    config.algo.distillation.round_length = 500
    config.train.steps = 2_500
    config.train.lr = 5e-4
    config.train.warmup = 50
    config.train.ema = 0.99
    config.eval.every = 500
    config.sample.n_steps = 8
    config.sample.noise_removal = "greedy"
    return config
