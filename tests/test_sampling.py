"""Samplers against exact distributions: with the leave-one-out denoiser of a known joint, samples follow that joint."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from duo_jax import sampling
from duo_jax.diffusion import schedules
from duo_jax.errors import UserError

FALSE_ALARM = 1e-4  # of each chi-square test below; keys are fixed, so a failure is a change of the code


def leave_one_out(joint, schedule):
    """The exact denoiser p(x_l | z_{-l}) of `joint [K] * L`, as log-probabilities; `sigma` gives alpha."""
    vocab, length = joint.shape[0], joint.ndim
    texts = jnp.asarray(list(itertools.product(range(vocab), repeat=length)))
    log_joint = jnp.log(jnp.asarray(joint.reshape(-1)))

    def denoise(z_t, sigma):
        alpha = jnp.exp(-sigma)[:, None, None]
        same = texts[None] == z_t[:, None]
        log_q = jnp.log(alpha * same + (1 - alpha) / vocab)  # [B, texts, L]
        others = log_q.sum(-1, keepdims=True) - log_q
        log_posterior = log_joint[None, :, None] + others
        hot = jax.nn.one_hot(texts, vocab)  # [texts, L, K]
        return jax.nn.logsumexp(log_posterior[..., None] + jnp.log(hot)[None], axis=1)

    del schedule
    return jax.jit(denoise)


def random_joint(vocab, length, seed):
    joint = np.random.default_rng(seed).gamma(0.7, size=(vocab,) * length) + 0.02
    return joint / joint.sum()


def p_value(tokens, joint):
    index = np.ravel_multi_index(np.asarray(tokens).T, joint.shape)
    counts = np.bincount(index, minlength=joint.size)
    return stats.chisquare(counts, joint.reshape(-1) * counts.sum()).pvalue


@pytest.mark.parametrize("name", ["log_linear", "cosine"])
@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_one_position_is_exact_with_any_number_of_steps(name, n_steps):
    joint, schedule = random_joint(5, 1, seed=n_steps), schedules.by_name(name, 1e-3)
    tokens = sampling.generate(
        leave_one_out(joint, schedule), jax.random.key(0), (20_000, 1), 5, schedule=schedule, n_steps=n_steps
    )
    assert tokens.dtype == jnp.int32
    assert p_value(tokens, joint) > FALSE_ALARM


def test_two_positions_are_exact_with_many_steps_and_not_with_one():
    joint, schedule = random_joint(3, 2, seed=1), schedules.log_linear()
    denoise = leave_one_out(joint, schedule)

    def sample(n_steps):
        return sampling.generate(denoise, jax.random.key(1), (20_000, 2), 3, schedule=schedule, n_steps=n_steps)

    assert p_value(sample(400), joint) > FALSE_ALARM
    assert p_value(sample(1), joint) < 1e-12  # one step draws the positions independently: the test can fail


def test_the_noise_removal_options():
    joint, schedule = np.array([0.1, 0.2, 0.7]), schedules.log_linear()

    def sample(removal, n_steps=3):
        return np.asarray(sampling.generate(
            leave_one_out(joint, schedule), jax.random.key(2), (20_000, 1), 3,
            schedule=schedule, n_steps=n_steps, noise_removal=removal,
        ))  # fmt: skip

    assert (sample("greedy") == 2).all()
    assert p_value(sample("ancestral"), joint) > FALSE_ALARM
    # At t = 1e-5 there is next to no noise to remove.
    assert p_value(sample("none"), joint) > FALSE_ALARM


@pytest.mark.parametrize("top_p", [0.5, 0.75])
def test_nucleus(top_p):
    joint, schedule = np.array([0.05, 0.15, 0.3, 0.5]), schedules.log_linear()
    tokens = sampling.generate(
        leave_one_out(joint, schedule), jax.random.key(3), (20_000, 1), 4, schedule=schedule, n_steps=4, top_p=top_p
    )
    kept = np.where(np.cumsum(joint[::-1])[::-1] - joint < 0, 0, joint)
    order = np.argsort(-joint)
    mass_before = np.cumsum(joint[order]) - joint[order]
    kept = np.zeros(4)
    kept[order[mass_before <= top_p]] = joint[order[mass_before <= top_p]]
    present = np.unique(tokens)
    # The prior's uniform tokens survive the walk only through the mixture; the last call removes them but for alpha(1e-5).
    assert set(present) <= set(np.flatnonzero(kept)) | set(range(4))
    counts = np.bincount(np.asarray(tokens).reshape(-1), minlength=4)
    assert counts[kept == 0].sum() < 20
    inside = kept > 0
    expected = kept[inside] / kept[inside].sum() * counts[inside].sum()
    assert stats.chisquare(counts[inside], expected).pvalue > FALSE_ALARM


def test_settings_that_cannot_be_are_refused():
    schedule = schedules.log_linear()
    for kwargs, message in (
        ({"n_steps": 0}, "at least 1 step"),
        ({"n_steps": 2, "sampler": "magic"}, "choose one of ancestral"),
        ({"n_steps": 2, "noise_removal": "yes"}, "choose one of ancestral, greedy, none"),
        ({"n_steps": 2, "top_p": 0.0}, "in \\(0, 1\\]"),
        ({"n_steps": 2, "top_p": 1.5}, "in \\(0, 1\\]"),
    ):
        with pytest.raises(UserError, match=message):
            sampling.generate(lambda z, s: z, jax.random.key(0), (1, 1), 3, schedule=schedule, **kwargs)


def test_unigram_entropy(golden):
    data = golden("l_metrics")
    np.testing.assert_allclose(sampling.unigram_entropy(data["tokens"]), data["entropy_each"], rtol=1e-6)
