"""Distils configs/owt.py's Duo to a few steps, with the paper's recipe (The Diffusion Duality, algorithm 1).

    python -m duo_jax.main --config=configs/distill_owt.py --config.init_from=runs/owt --workdir=runs/distill_owt

Hardware: any number of devices that divide the batch of 128. Score to expect: the paper reports generative perplexities
(GPT-2 large, greedy tail) of 69.6 in 8 steps, 54.1 in 16 and 46.3 in 32; not run here. To measure them, run
duo_jax.evaluation.generate_quality --protocol=reference --judge=openai-community/gpt2-large --noise_removal=greedy.
"""

from ml_collections import ConfigDict

from configs import owt


def get_config() -> ConfigDict:
    """Returns the distillation of the paper: five rounds of 10,000 steps, over which dt goes from 1/512 to 16/512."""
    config = owt.get_config()
    config.algo.name = "dcd"
    # A wider range than in training: few steps go from pure noise to clean text. Gamma from -4 to -1 for GPT-2's ids.
    config.algo.alpha_max, config.algo.alpha_min = 0.99869, 0.0061862
    config.algo.distillation.teacher = "student"  # each round's new teacher is the student, not its average
    config.train.steps = 50_000
    config.train.batch_size = 128
    config.train.lr = 6e-5
    config.train.warmup = 500
    config.train.ema = 0.999
    config.eval.batch_size = 128
    config.sample.n_steps = 8
    config.sample.noise_removal = "greedy"
    return config
