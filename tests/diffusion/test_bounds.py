"""Each bound is tight: for the ideal denoiser its integral over time is the data's entropy, exactly."""

import itertools

import jax
import numpy as np
import pytest
from brute_force import uniform_marginal, unit_interval

from duo_jax.diffusion import absorbing, schedules, uniform
from duo_jax.diffusion.categorical import nll

# Nodes in 1 - alpha. With alpha = 1 - t, d alpha / d t = -1 and the integral over t is the integral over these.
NOISE, WEIGHT = unit_interval()
TOLERANCE = 1e-4


def entropy(p):
    return -np.sum(p[p > 0] * np.log(p[p > 0]))


def random_distribution(rng, *shape, sharpness=1.5):
    p = np.exp(sharpness * rng.normal(size=shape))
    return p / p.sum()


@pytest.mark.parametrize("k", [2, 3, 7, 20, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_duo_nelbo_of_one_token_is_the_entropy(k, seed):
    p = random_distribution(np.random.default_rng(seed), k, sharpness=1.0 + seed)
    t, x, z = (v.ravel() for v in np.meshgrid(np.arange(len(NOISE)), np.arange(k), np.arange(k), indexing="ij"))
    alpha = np.float32(1 - NOISE[t])
    log_p = np.broadcast_to(np.float32(np.log(p)), (len(t), k))
    f = np.float64(jax.jit(uniform.nelbo_from_logits)(log_p, z, x, alpha, np.float32(-1)))
    q = np.where(x == z, 1 - NOISE[t], 0) + NOISE[t] / k
    assert abs(np.sum(WEIGHT[t] * p[x] * q * f) - entropy(p)) < TOLERANCE


def test_duo_nelbo_needs_the_right_denoiser():
    """The same integral with another denoiser exceeds the entropy: the test above can fail."""
    p = random_distribution(np.random.default_rng(0), 5)
    wrong = random_distribution(np.random.default_rng(1), 5)
    t, x, z = (v.ravel() for v in np.meshgrid(np.arange(len(NOISE)), np.arange(5), np.arange(5), indexing="ij"))
    log_p = np.broadcast_to(np.float32(np.log(wrong)), (len(t), 5))
    f = np.float64(uniform.nelbo_from_logits(log_p, z, x, np.float32(1 - NOISE[t]), np.float32(-1)))
    bound = np.sum(WEIGHT[t] * p[x] * (np.where(x == z, 1 - NOISE[t], 0) + NOISE[t] / 5) * f)
    assert bound > entropy(p) + 0.01


@pytest.mark.parametrize("schedule", [schedules.log_linear(0.0), schedules.cosine(0.0)])
def test_duo_nelbo_does_not_depend_on_the_schedule(schedule):
    p = random_distribution(np.random.default_rng(3), 4)
    time, weight = unit_interval(96)
    t, x, z = (v.ravel() for v in np.meshgrid(np.arange(96), np.arange(4), np.arange(4), indexing="ij"))
    alpha, dalpha = schedule.alpha(np.float32(time))[t], schedule.dalpha(np.float32(time))[t]
    log_p = np.broadcast_to(np.float32(np.log(p)), (len(t), 4))
    f = np.float64(uniform.nelbo_from_logits(log_p, z, x, alpha, dalpha))
    alpha = np.float64(alpha)
    q = np.where(x == z, alpha, 0) + (1 - alpha) / 4
    assert abs(np.sum(weight[t] * p[x] * q * f) - entropy(p)) < TOLERANCE


@pytest.mark.parametrize(("k", "length"), [(2, 2), (3, 2), (5, 2), (2, 3), (3, 3)])
def test_duo_nelbo_of_a_joint_is_its_entropy(k, length):
    joint = random_distribution(np.random.default_rng(k + length), *([k] * length))
    sequences = np.array(list(itertools.product(range(k), repeat=length)))
    n = len(sequences)
    flat = joint.ravel()
    total = 0.0
    evaluate = jax.jit(uniform.nelbo)
    for noise, weight in zip(NOISE, WEIGHT, strict=True):
        alpha = 1 - noise
        # likelihood[l][z, x] = q(z_l | x_l)
        table = np.stack([uniform_marginal(alpha, v, k) for v in range(k)])
        likelihood = [table[sequences[:, l]][:, sequences[:, l]].T for l in range(length)]
        log_p = np.zeros((n, length, k))
        for l in range(length):
            others = np.prod([likelihood[m] for m in range(length) if m != l], axis=0) * flat
            for v in range(k):
                log_p[:, l, v] = others[:, sequences[:, l] == v].sum(-1)
        log_p = np.float32(np.log(log_p / log_p.sum(-1, keepdims=True)))
        z, x = np.repeat(np.arange(n), n), np.tile(np.arange(n), n)
        f = np.float64(evaluate(log_p[z], sequences[z], sequences[x], np.float32(alpha), np.float32(-1))).sum(-1)
        total += weight * np.sum(flat[x] * np.prod(likelihood, axis=0)[z, x] * f)
    assert abs(total - entropy(flat)) < TOLERANCE


def masked_cases(k, length):
    """All (z, x, which are masked) of the absorbing process, the mask being id k."""
    for x in itertools.product(range(k), repeat=length):
        for hidden in itertools.product([False, True], repeat=length):
            yield np.where(hidden, k, x), np.array(x), np.array(hidden)


def conditional(joint, z, k, position):
    """p(x_position | the revealed tokens of z) [k]."""
    index = tuple(slice(None) if v == k else slice(v, v + 1) for v in z)
    axes = tuple(a for a in range(joint.ndim) if a != position)
    p = joint[index].sum(axis=axes)
    return p / p.sum()


@pytest.mark.parametrize(("k", "length"), [(7, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("name", ["mdlm", "mdlm_from_logits", "sedd"])
def test_absorbing_bounds_of_a_joint_are_its_entropy(name, k, length):
    joint = random_distribution(np.random.default_rng(10 * k + length), *([k] * length))
    assert abs(absorbing_bound(name, joint) - entropy(joint.ravel())) < TOLERANCE


@pytest.mark.parametrize("n_steps", [1, 3, 40])
def test_d3pm_bound_of_one_token_is_its_entropy_for_any_number_of_steps(n_steps):
    p = random_distribution(np.random.default_rng(5), 7)
    assert abs(absorbing_bound("d3pm", p, n_steps) - entropy(p)) < TOLERANCE


def test_d3pm_bound_of_a_joint_falls_to_its_entropy_as_one_over_the_steps():
    """Tokens revealed in one step are drawn independently, which costs a T-step chain of order 1/T."""
    joint = random_distribution(np.random.default_rng(6), 3, 3, 3)
    gaps = [absorbing_bound("d3pm", joint, n) - entropy(joint.ravel()) for n in (20, 40, 80)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    np.testing.assert_allclose([gaps[0] / gaps[1], gaps[1] / gaps[2]], 2.0, rtol=0.1)


def absorbing_bound(name, joint, n_steps=0):
    """The bound of the ideal denoiser, summed over all x and masks and integrated (D3PM: summed) over time."""
    k, length = joint.shape[0], joint.ndim
    cases = [case for case in masked_cases(k, length) if case[2].any()]
    z, x, hidden = (np.array(v) for v in zip(*cases, strict=True))
    p = np.zeros((len(z), length, k + 1))
    for n, l in zip(*np.nonzero(hidden), strict=True):
        p[n, l, :k] = conditional(joint, z[n], k, l)
    logits = np.float32(np.log(np.maximum(p, 1e-30)))
    if name == "d3pm":
        noise, weight = np.arange(1, n_steps + 1) / n_steps, np.full(n_steps, 1 / n_steps)
    else:
        noise, weight = NOISE, WEIGHT
    total = 0.0
    for u, w in zip(noise, weight, strict=True):
        alpha, dalpha = np.float32(1 - u), np.float32(-1)
        if name == "mdlm":
            f = absorbing.mdlm_nelbo(absorbing.subs(logits, z, k), x, alpha, dalpha)
        elif name == "mdlm_from_logits":
            f = absorbing.mdlm_nelbo_from_logits(logits, z, x, alpha, dalpha, k)
        elif name == "sedd":
            log_odds = np.log(alpha / max(1 - alpha, 1e-8))  # the nodes nearest to 0 round to alpha = 1
            log_score = np.where(np.arange(k + 1) == z[..., None], 0, logits + log_odds)
            f = absorbing.sedd_nelbo(log_score, z, x, alpha, dalpha, k)
        else:
            f = absorbing.d3pm_nelbo(logits, z, x, alpha, k, n_steps)
        q = np.prod(np.where(hidden, u, 1 - u), axis=-1)
        total += w * np.sum(joint[tuple(x.T)] * q * np.float64(f).sum(-1))
    return total


def test_ar_cross_entropy_of_a_joint_is_its_entropy():
    joint = random_distribution(np.random.default_rng(4), 3, 4)
    first, second = joint.sum(1), joint / joint.sum(1, keepdims=True)
    x = np.array(list(itertools.product(range(3), range(4))))
    logits = np.full((12, 2, 4), -1e9, np.float32)
    logits[:, 0, :3] = np.log(first) + 2.0  # unnormalised on purpose
    logits[:, 1] = np.log(second)[x[:, 0]] - 1.0
    loss = np.float64(absorbing.ar_nll(logits, x)).sum(-1)
    assert abs(np.sum(joint.ravel() * loss) - entropy(joint.ravel())) < 1e-6
    np.testing.assert_allclose(nll(logits, x), absorbing.ar_nll(logits, x))
