"""What distillation learns from an exact teacher: all noisy texts of a tiny vocabulary, enumerated in float64.

A network is a table `[S, L, K]` here, of its predictions for each of the S = K^L noisy texts, one table a time of the grid.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from duo_jax.diffusion import distillation, uniform

K, L, TIMES = 5, 3, 32
TEXTS = np.array(list(itertools.product(range(K), repeat=L)))
ALPHA = np.clip(1.0 - np.arange(TIMES + 1) / TIMES, 1e-6, 1.0 - 1e-6)


def data():
    """Returns the probability of each text: ten that follow Zipf's law, and one in a thousand for all others together."""
    rng = np.random.default_rng(3)
    share = np.full(len(TEXTS), 1e-3 / len(TEXTS))
    frequency = 1.0 / np.arange(1, 11)
    share[rng.choice(len(TEXTS), 10, replace=False)] += (1 - 1e-3) * frequency / frequency.sum()
    return share


@functools.cache
def exact_teacher(floor=0.0):
    """Returns, for each time, p(x_i | all z but z_i), and `floor` of it spread over all tokens."""
    joint, tables = data().reshape((K,) * L), []
    for alpha in ALPHA:
        flip = alpha * np.eye(K) + (1 - alpha) / K
        table = np.empty((*(K,) * L, L, K))
        for i in range(L):
            seen = joint
            for j in range(L):
                if j != i:
                    seen = np.moveaxis(np.tensordot(seen, flip, axes=(j, 0)), -1, j)
            seen = np.expand_dims(np.moveaxis(seen, i, -1), i)
            table[..., i, :] = seen / seen.sum(-1, keepdims=True)
        tables.append((1 - floor) * table.reshape(-1, L, K) + floor / K)
    return tables


def earlier_given_later(t, s):
    """Returns q(z_s | z_t) `[S, S]` of one trajectory: a token that the noise has at s, it has at t."""
    pair = np.zeros((K, K, K))  # of x, z_t, z_s
    kept_t, kept_s = (ALPHA[i] + (1 - ALPHA[i]) / K for i in (t, s))
    for x, rival in itertools.product(range(K), repeat=2):
        if x == rival:
            pair[x, x, x] = kept_t
        else:
            pair[x, rival, x], pair[x, rival, rival] = (kept_s - kept_t) / (K - 1), (1 - kept_s) / (K - 1)
    both = data().reshape((K,) * L)
    for _ in range(L):
        both = np.tensordot(both, pair, axes=(0, 0))  # one text's place after the other becomes its z_t and z_s
    both = both.transpose([*range(0, 2 * L, 2), *range(1, 2 * L, 2)]).reshape(len(TEXTS), len(TEXTS))
    return both / both.sum(1, keepdims=True)


def round_of(teacher, steps, forward=False):
    """Returns the student at the optimum of a round in which s lies `steps` times before t."""
    student = []
    for t in range(TIMES + 1):
        s = max(t - steps, 0)
        weights = earlier_given_later(t, s)
        if forward:
            mean = np.tensordot(weights, teacher[s], axes=1)
        else:
            mean = np.exp(np.tensordot(weights, np.log(teacher[s]), axes=1))
        student.append(mean / mean.sum(-1, keepdims=True))
    return student


def distilled(teacher):
    """Returns the network after rounds of 1, 2, 4, 8 and 16 times."""
    return functools.reduce(lambda network, n: round_of(network, 2**n), range(5), teacher)


def written(network, n_steps):
    """Returns the probability of each text that `n_steps` ancestral steps write, exactly."""
    share = np.full(len(TEXTS), 1.0 / len(TEXTS))
    for t in range(TIMES, 0, -TIMES // n_steps):
        s = t - TIMES // n_steps
        with jax.enable_x64(True):
            step = np.asarray(uniform.posterior(network[t], TEXTS, ALPHA[s], ALPHA[t]))
        share = np.einsum("s,sa,sb,sc->abc", share, *step.transpose(1, 0, 2), optimize=True).ravel()
    return share


def divergence(network, n_steps):
    """Returns KL(written texts || data) in nats."""
    share = written(network, n_steps)
    return np.sum(share * np.log(np.maximum(share, 1e-300) / data()))


@pytest.mark.parametrize(("loss", "forward"), [(distillation.kl_backward, False), (distillation.kl_forward, True)])
def test_the_losses_are_least_at_the_geometric_and_the_arithmetic_mean_of_the_teacher(loss, forward):
    teacher, t, s = exact_teacher(), 24, 16
    weights = earlier_given_later(t, s)

    def expected(student):
        return (weights[:, :, None] * loss(student[:, None], np.log(teacher[s])[None])).sum()

    with jax.enable_x64(True):
        gradient = jax.grad(expected)
        optimum = np.log(round_of(teacher, t - s, forward)[t])
        other = np.log(round_of(teacher, t - s, not forward)[t])
        np.testing.assert_allclose(gradient(optimum), 0.0, atol=1e-11)  # a sum of 125 terms of up to 20 nats
        assert np.abs(gradient(other)).max() > 1e-2


def test_few_steps_of_an_exact_teacher_get_better_and_many_get_worse():
    """Few steps draw tokens without sight of one another, which agreeing beforehand cures; many steps pay for it."""
    before = exact_teacher()
    after = distilled(before)
    for n_steps in (2, 4):
        assert divergence(after, n_steps) < 0.7 * divergence(before, n_steps)
    assert divergence(after, 32) > 2 * divergence(before, 32)


def test_the_student_leans_on_a_places_own_token_which_the_teacher_ignores():
    """A text is as its tokens are, so z_t says of z_s around it what it should: a wrong token looks likelier than it is."""

    def own(network, t):  # averaged over what the token and its neighbours are; 1/K if it tells nothing
        return np.take_along_axis(network[t], TEXTS[..., None], -1).mean() * K

    before, after = exact_teacher(), distilled(exact_teacher())
    for t in (8, 16, 24):
        assert own(before, t) == pytest.approx(1.0, rel=1e-12)
        assert own(after, t) > 1.1


def test_a_floor_under_the_teachers_predictions_grows():
    """Tokens that a teacher thinks a little of everywhere gain on those that it is sure of here and there."""
    before = exact_teacher(floor=0.1)
    after = distilled(before)
    assert divergence(after, 8) > divergence(before, 8)
