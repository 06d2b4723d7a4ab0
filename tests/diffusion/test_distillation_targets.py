"""Trajectory pairs against their enumerated joint law, the divergences against float64, the step sizes by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import assert_distributed, exact_operator, softmax

from duo_jax.diffusion import distillation, duality
from duo_jax.errors import UserError


def joint_law(gamma_t, gamma_s, x, k):
    """P(z_t, z_s) [K, K]: on one trajectory a token is x until its rival, a uniform choice, overtakes it, once."""
    alpha, _ = exact_operator(np.array([gamma_t, gamma_s]), k)
    win_t, win_s = alpha + (1 - alpha) / k
    table = np.zeros((k, k))
    for rival in range(k):
        if rival != x:
            table[rival, x] = (win_s - win_t) / (k - 1)
            table[rival, rival] = (1 - win_s) / (k - 1)
    table[x, x] = win_t
    return table


CASES = [(2, 0.0, -1.0), (3, -1.0, -1.5), (8, -0.5, -3.0), (40, -2.0, -2.3), (8, -1.0, -1.0)]


@pytest.mark.parametrize(("k", "gamma_t", "gamma_s"), CASES)
def test_pairs_follow_the_joint_law(k, gamma_t, gamma_s):
    x = jnp.full((500, 200), 1)
    draw = jax.jit(distillation.trajectory_pair, static_argnums=4)
    z_t, z_s = draw(jax.random.key(k), x, gamma_t, gamma_s, k)
    counts = np.bincount(np.asarray(z_t * k + z_s).ravel(), minlength=k * k)
    assert_distributed(counts, joint_law(gamma_t, gamma_s, 1, k))
    assert z_t.dtype == z_s.dtype == jnp.int32


@pytest.mark.parametrize(("k", "gamma_t", "gamma_s"), CASES[:4])
def test_the_joint_law_is_that_of_one_dense_noise(k, gamma_t, gamma_s):
    x = jnp.full((200, 400), 1)
    eps = jax.random.normal(jax.random.key(k), (*x.shape, k))
    z_t, z_s = (duality.latent_from_noise(eps, x, gamma).argmax(-1) for gamma in (gamma_t, gamma_s))
    counts = np.bincount(np.asarray(z_t * k + z_s).ravel(), minlength=k * k)
    assert_distributed(counts, joint_law(gamma_t, gamma_s, 1, k))


def test_pairs_at_a_real_vocabulary():
    """K = 50,258 with a time a sequence: the shares of the three outcomes, and never a [B, L, K] array."""
    gamma_t, gamma_s = jnp.array([-3.0, -2.0]), jnp.array([-3.2, -2.4])
    x = jnp.broadcast_to(jnp.arange(50_000), (2, 50_000))
    z_t, z_s = distillation.trajectory_pair(jax.random.key(0), x, gamma_t, gamma_s, 50_258)
    for row in range(2):
        alpha, _ = exact_operator([float(gamma_t[row]), float(gamma_s[row])], 50_258)
        both, early = np.sum(z_t[row] == x[row]), np.sum((z_t[row] != x[row]) & (z_s[row] == x[row]))
        win_t, win_s = alpha + (1 - alpha) / 50_258
        assert_distributed([both, early, 50_000 - both - early], [win_t, win_s - win_t, 1 - win_s])
    assert not np.any((z_t == x) & (z_s != x))
    moved = (np.asarray(z_s) != np.asarray(x)).ravel()
    np.testing.assert_array_equal(np.asarray(z_t).ravel()[moved], np.asarray(z_s).ravel()[moved])


def test_divergences():
    rng = np.random.default_rng(0)
    student, teacher = np.float32(2 * rng.normal(size=(2, 6, 300)) + 5)
    p, q = softmax(student), softmax(teacher)
    np.testing.assert_allclose(
        distillation.kl_backward(student, teacher), np.float64((p * np.log(p / q)).sum(-1)), rtol=1e-5
    )
    np.testing.assert_allclose(
        distillation.kl_forward(student, teacher), np.float64((q * np.log(q / p)).sum(-1)), rtol=1e-5
    )


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_divergence_of_nearly_equal_networks_keeps_its_digits(distance):
    rng = np.random.default_rng(0)
    student = np.float32(rng.normal(size=(5, 1000)))
    teacher = np.float32(student + distance * rng.normal(size=(5, 1000)))
    p, q = softmax(student), softmax(teacher)
    expected = np.float64((p * np.log(p / q)).sum(-1))
    np.testing.assert_allclose(distillation.kl_backward(student, teacher), expected, rtol=2e-6 / distance)
    assert np.all(np.abs(distillation.kl(student, student)) < 1e-9)


def test_divergence_gradients():
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        pair = jnp.asarray(rng.normal(size=(4, 7))), jnp.asarray(rng.normal(size=(4, 7)))

        def plain(a, b):
            log_p, log_q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
            return jnp.sum(jnp.exp(log_p) * (log_p - log_q))

        expected = jax.grad(plain, (0, 1))(*pair)
        for ours, theirs in zip(
            jax.grad(lambda a, b: distillation.kl(a, b).sum(), (0, 1))(*pair), expected, strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-12)
    certain = jnp.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0], [-jnp.inf, 0.0, 1.0]])
    for other in (certain[::-1] * jnp.array([1.0, 1.0, 0.0]), jnp.zeros((3, 3)), -certain.at[2].set(0.0)):
        gradients = jax.grad(lambda a, b: distillation.kl(a, b).sum(), (0, 1))(certain, jnp.nan_to_num(other))
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_against_the_reference(golden):
    vectors = golden("j_distill")
    student, teacher = vectors["log_student"], vectors["log_teacher"]
    np.testing.assert_allclose(distillation.kl_backward(student, teacher), vectors["kl-bwd_float64"], rtol=1e-5)
    np.testing.assert_allclose(distillation.kl_forward(student, teacher), vectors["kl-fwd_float64"], rtol=1e-5)
    steps = vectors["dt_steps"]
    np.testing.assert_array_equal(jax.jit(distillation.doubling_dt)(steps), np.float32(vectors["dt_T512"]))
    np.testing.assert_array_equal(distillation.doubling_dt(steps, n_steps=64), np.float32(vectors["dt_T64"]))
    np.testing.assert_allclose(distillation.linear_dt(steps, 50_000), vectors["dt_linear"], rtol=1e-6)


def test_times_of_a_pair_against_the_reference(golden):
    vectors = golden("j_distill")
    drawn = 1e-3 + (1 - 1e-3) * (np.arange(4) + vectors["u"]) / 4
    t, s = distillation.pair_times(drawn, distillation.doubling_dt(20_000))
    for time, sigma in ((t, vectors["nll_sigma_t"]), (s, vectors["nll_sigma_s"])):
        alpha = duality.alpha(duality.gamma(time, -4.0, -1.0), 50_257)
        # The reference rounds gamma to the nearest point of its table, a 4e-5 apart.
        np.testing.assert_allclose(-np.log(alpha), sigma[:, 0], rtol=3e-4)
    dt = np.float32([0.5, 0.25, 2.0])
    t, s = distillation.pair_times(jnp.array([0.9, 0.1, 0.5]), dt)
    np.testing.assert_allclose(t, [1.0, 0.35, 1.0])
    np.testing.assert_allclose(s, [0.5, 0.1, 0.0], rtol=1e-6)


def test_step_size_never_exceeds_one():
    assert distillation.doubling_dt(10**8) == 1.0
    np.testing.assert_array_equal(distillation.doubling_dt(jnp.array([0, 9, 10, 30]), 10, 4), [0.25, 0.25, 0.5, 1.0])
    with pytest.raises(UserError, match="at least 1"):
        distillation.doubling_dt(0, 0)
    with pytest.raises(UserError, match="at least 1"):
        distillation.linear_dt(0, 0)
