"""The absorbing-state process, MDLM, SEDD and D3PM against enumeration and the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import assert_distributed, histogram, softmax

from duo_jax.diffusion import absorbing
from duo_jax.diffusion.arrays import token_keys
from duo_jax.errors import UserError

K, MASK = 6, 5
CASES = [(0.9, 0.3), (1.0, 0.5), (0.02, 0.01), (1.0, 0.0), (0.5, 0.5)]


def forward_kernel(alpha, x):
    """q(z | x) [K] of the absorbing process; the mask stays the mask."""
    return alpha * np.eye(K)[x] + (1 - alpha) * np.eye(K)[MASK]


def bayes(p, z_t, alpha_s, alpha_t):
    prior_s = sum(p[x] * forward_kernel(alpha_s, x) for x in range(K))
    joint = np.array([prior_s[j] * forward_kernel(alpha_t / alpha_s, j)[z_t] for j in range(K)])
    return joint / joint.sum()


def random_p(seed):
    return np.append(np.float64(softmax(np.random.default_rng(seed).normal(size=K - 1))), 0.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_forward_process(alpha):
    z = absorbing.q_sample(jax.random.key(0), jnp.full((300, 100), 2), alpha, MASK)
    assert_distributed(histogram(z, K), forward_kernel(alpha, 2))


@pytest.mark.parametrize(("alpha_s", "alpha_t"), CASES)
def test_posterior_is_bayes_rule(alpha_s, alpha_t):
    for seed in range(3):
        p = random_p(seed)
        for z_t in (MASK, 2):
            if z_t != MASK and alpha_t == 0:
                continue
            # A revealed token is x itself, which is how the network's prediction there is used.
            table = absorbing.posterior(jnp.float32(p)[None, None], jnp.array([[z_t]]), alpha_s, alpha_t, MASK)
            np.testing.assert_allclose(table[0, 0], bayes(p, z_t, alpha_s, alpha_t), atol=1e-6)


@pytest.mark.parametrize(("alpha_s", "alpha_t"), CASES)
@pytest.mark.parametrize("kappa", [1.0, 0.4, 0.0])
def test_step_draws_from_the_posterior(alpha_s, alpha_t, kappa):
    p, n = random_p(7), 40_000
    logits = np.log(np.maximum(p, 1e-30)) + 3
    logits[MASK] = 4.0  # SUBS never predicts the mask, whatever the network says
    keys = token_keys(jax.random.key(1), (n,))
    for z_t in (MASK, 2):
        q_0 = p if z_t == MASK else np.eye(K)[z_t]
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        q_s = reveal * p + (1 - reveal) * np.eye(K)[MASK] if z_t == MASK else np.eye(K)[z_t]
        expected = kappa * q_s + (1 - kappa) * (alpha_s * q_0 + (1 - alpha_s) * np.eye(K)[MASK])
        step = jax.jit(absorbing.mixture_step, static_argnums=5)
        z_s = step(keys, jnp.tile(jnp.float32(logits), (n, 1)), jnp.full(n, z_t), alpha_s, alpha_t, MASK, kappa)
        assert_distributed(histogram(z_s, K), expected)


def test_posterior_and_psi_against_the_reference(golden):
    vectors = golden("d_posteriors")
    z_t = jnp.asarray(vectors["xt_absorb"])
    alpha_s, alpha_t = vectors["alpha_s"], vectors["alpha_t"]
    table = absorbing.posterior(jnp.float32(vectors["p_x0_absorb"]), z_t, alpha_s, alpha_t, 52)
    np.testing.assert_allclose(table, vectors["absorb_posterior"], atol=1e-6)
    b, l = np.argwhere(vectors["xt_absorb"] == 52)[0]
    logits = jnp.tile(jnp.log(jnp.float32(vectors["p_x0_absorb"][b, l])), (40_000, 1))
    for kappa in ("0.0", "0.3", "0.95", "1.0"):
        keys = token_keys(jax.random.key(3), (40_000,))
        levels = alpha_s[b, 0], alpha_t[b, 0]
        step = jax.jit(absorbing.mixture_step, static_argnums=5)
        z_s = step(keys, logits, jnp.full(40_000, 52), *levels, 52, float(kappa))
        assert_distributed(histogram(z_s, 53), vectors[f"psi_mdlm_kappa{kappa}"][b, l])


def test_losses_against_the_reference(golden):
    vectors = golden("b_losses")
    with jax.enable_x64(True):
        logits, z_t, x, alpha, dalpha = (
            jnp.asarray(vectors[name]) for name in ("logits", "xt_absorb", "x0", "alpha_t", "dalpha_t")
        )
        log_p = absorbing.subs(logits, z_t, 52)
        np.testing.assert_allclose(jnp.exp(log_p), np.exp(vectors["mdlm_subs_f64"]), atol=1e-12)
        np.testing.assert_allclose(absorbing.mdlm_nelbo(log_p, x, alpha, dalpha), vectors["mdlm_nll_f64"], rtol=1e-9)
        loss = absorbing.mdlm_nelbo_from_logits(logits, z_t, x, alpha, dalpha, 52)
        np.testing.assert_allclose(loss, vectors["mdlm_nll_f64"], rtol=1e-9, atol=1e-12)

        log_score = absorbing.sedd_log_score(logits, z_t, alpha)
        np.testing.assert_allclose(log_score, vectors["sedd_logscore_f64"], rtol=1e-9, atol=1e-9)
        loss = absorbing.sedd_nelbo(log_score, z_t, x, alpha, dalpha, 52)
        np.testing.assert_allclose(loss, vectors["sedd_nll_f64"], rtol=2e-6, atol=1e-9)  # float32 inside the reference

        n_steps = int(vectors["d3pm_T"])
        loss = absorbing.d3pm_nelbo(logits, z_t, x, jnp.asarray(vectors["d3pm_alpha_t"]), 52, n_steps)
        np.testing.assert_allclose(loss, vectors["d3pm_kl_correct_f64"], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n_steps", [1, 10, 1000])
def test_d3pm_is_the_divergence_of_the_two_posteriors(n_steps):
    """From the definition, in float64: T KL(q || p), p in proportion to sum_j p_j q(z_s, z_t | x = j)."""
    p = np.float64(softmax(np.random.default_rng(0).normal(size=K)))  # some mass on the mask
    for alpha_t in (0.0, 0.3, 1 - 1 / n_steps, 1 - 2 / n_steps):
        if not 0 <= alpha_t < 1:
            continue
        alpha_s = min(alpha_t + 1 / n_steps, 1.0)
        q, model = bayes(np.eye(K)[2], MASK, alpha_s, alpha_t), bayes(p, MASK, alpha_s, alpha_t)
        seen = q > 1e-12
        expected = n_steps * np.sum(q[seen] * np.log(q[seen] / model[seen]))
        with jax.enable_x64(True):
            loss = absorbing.d3pm_nelbo(jnp.log(p), jnp.array(MASK), jnp.array(2), alpha_t, MASK, n_steps)
            np.testing.assert_allclose(loss, expected, rtol=1e-7)
        # float32 rounds alpha, hence 1 - alpha, which the last steps magnify.
        loss = absorbing.d3pm_nelbo(jnp.float32(np.log(p)), jnp.array(MASK), jnp.array(2), alpha_t, MASK, n_steps)
        np.testing.assert_allclose(loss, expected, rtol=1e-5 + 2e-7 * n_steps)
    assert absorbing.d3pm_nelbo(jnp.log(p), jnp.array(2), jnp.array(2), 0.5, MASK) == 0.0


@pytest.mark.parametrize("n_steps", [1190, 10_000, 50_000])
def test_d3pms_last_step_leaves_no_noise_however_its_time_is_rounded(n_steps):
    p = np.float64(softmax(np.random.default_rng(0).normal(size=K)))
    alpha_t = jnp.float32(1.0) - jnp.float32(1) / n_steps
    noise = 1.0 - np.float64(alpha_t)  # as rounded
    reveal = min(1 / (n_steps * noise), 1.0)
    # With no noise left, what the network gives to the mask is lost altogether.
    expected = n_steps * (-reveal * np.log(p[2]) + np.log1p(p[MASK] * (1 - noise) / noise))
    loss = absorbing.d3pm_nelbo(jnp.float32(np.log(p)), jnp.array(MASK), jnp.array(2), alpha_t, MASK, n_steps)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_sedd_step_draws_from_the_staggered_score():
    score = np.float32(np.random.default_rng(0).uniform(0.05, 0.6, K))
    n = 40_000
    for z_t in (MASK, 2):
        for dsigma in (0.1, 0.3, 3.0):  # the last asks for more than all of the mass: nothing stays masked
            table = absorbing.sedd_probabilities(jnp.log(score)[None], jnp.array([z_t]), dsigma, MASK)[0]
            np.testing.assert_allclose(table.sum(), 1.0, rtol=1e-6)
            keys, log_score = token_keys(jax.random.key(z_t), (n,)), jnp.tile(jnp.log(score), (n, 1))
            z_s = jax.jit(absorbing.sedd_step, static_argnums=4)(keys, log_score, jnp.full(n, z_t), dsigma, MASK)
            assert_distributed(histogram(z_s, K), table)


def test_sedd_step_of_the_true_score_is_the_posterior():
    """With the exact ratios q(j)/q(mask), the analytic step is Bayes' rule."""
    p, alpha_s, alpha_t = random_p(1), 0.7, 0.4
    score = p * alpha_t / (1 - alpha_t)
    score[MASK] = 1.0
    dsigma = np.log(alpha_s / alpha_t)
    table = absorbing.sedd_probabilities(jnp.log(jnp.float32(score)), jnp.array(MASK), dsigma, MASK)
    np.testing.assert_allclose(table, bayes(p, MASK, alpha_s, alpha_t), atol=1e-6)


def test_sedd_step_against_the_reference(golden):
    """Staggered score times transition, for scores that leave some mass masked (else the reference goes below 0)."""
    vectors = golden("d_posteriors")
    z_t = vectors["xt_absorb"]
    product = vectors["staggered_score"] * vectors["transp_transition"]
    # The network's score of the input token is 1; ours takes that for granted, so its entry of `score` must be put in.
    growth = np.expm1(np.float64(vectors["dsigma"]))
    compared = 0
    for b, l in np.argwhere(z_t == 52):
        others = np.delete(vectors["score"][b, l], 52)
        np.testing.assert_allclose(product[b, l, :52], growth[b, 0] * others, rtol=1e-5)
        score = np.append(others * 0.5 / (growth[b, 0] * others.sum()), 1.0)  # scaled so that half is revealed
        table = absorbing.sedd_probabilities(jnp.log(jnp.float32(score)), jnp.array(52), jnp.log1p(growth[b, 0]), 52)
        np.testing.assert_allclose(table[:52], 0.5 * others / others.sum(), rtol=5e-6)
        np.testing.assert_allclose(table[52], 0.5, rtol=5e-6)
        compared += 1
    assert compared > 0


LOSSES = {
    "mdlm": lambda l, z, x, alpha: absorbing.mdlm_nelbo(absorbing.subs(l, z, MASK), x, alpha, -1.0),
    "mdlm_from_logits": lambda l, z, x, alpha: absorbing.mdlm_nelbo_from_logits(l, z, x, alpha, -1.0, MASK),
    "sedd": lambda l, z, x, a: absorbing.sedd_nelbo(absorbing.sedd_log_score(l, z, a), z, x, a, -1.0, MASK),
    "d3pm": lambda l, z, x, alpha: absorbing.d3pm_nelbo(l, z, x, alpha, MASK),
    "ar": lambda l, z, x, alpha: absorbing.ar_nll(l, x, MASK),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_at_every_extreme(name):
    z_t, x = jnp.array([MASK, MASK, 1, 0]), jnp.array([0, 1, 1, 0])
    onehot = jax.nn.one_hot(jnp.array([0, 0, 1, 2]), K)
    evaluate = jax.jit(jax.value_and_grad(lambda l, alpha: LOSSES[name](l, z_t, x, alpha).sum()))
    for scale in (0.0, 40.0, -40.0, 1e4, -1e4):
        for alpha in (1e-6, 1e-3, 0.5, 1 - 1e-3, 1.0):
            value, gradient = evaluate(scale * onehot, alpha)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


SCORE = {"sedd of a score": lambda l, z, x, alpha: absorbing.sedd_nelbo(l, z, x, alpha, -1.0, MASK)}


@pytest.mark.parametrize("loss", (LOSSES | SCORE).values(), ids=LOSSES | SCORE)
def test_half_precision_logits_and_levels_are_computed_with_in_float32(loss):
    z_t, x = jnp.array([MASK, MASK, 1, 0]), jnp.array([0, 1, 1, 0])
    logits, alpha = 3 * jax.random.normal(jax.random.key(0), (4, K)), jnp.float32(0.3)
    half = logits.astype(jnp.bfloat16), alpha.astype(jnp.bfloat16)
    got, wanted = (loss(l, z_t, x, a) for l, a in (half, [v.astype(jnp.float32) for v in half]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_the_mask_is_no_next_token():
    logits, x = np.random.default_rng(0).normal(size=(3, K)), np.array([0, 1, 4])
    text = softmax(logits[:, :MASK])[np.arange(3), x]
    np.testing.assert_allclose(absorbing.ar_nll(jnp.float32(logits), x, MASK), -np.log(np.float64(text)), rtol=1e-6)


def test_losses_are_zero_where_nothing_is_masked():
    logits, x = jax.random.normal(jax.random.key(0), (3, K)), jnp.array([0, 1, 2])
    assert not np.any(absorbing.mdlm_nelbo_from_logits(logits, x, x, 0.5, -1.0, MASK))
    assert not np.any(absorbing.mdlm_nelbo(absorbing.subs(logits, x, MASK), x, 0.5, -1.0))
    assert not np.any(absorbing.sedd_nelbo(logits, x, x, 0.5, -1.0, MASK))
    expected = -jax.nn.log_softmax(logits)[jnp.arange(3), x]
    np.testing.assert_allclose(absorbing.d3pm_reconstruction(logits, x), expected, rtol=1e-6)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="at least 1"):
        absorbing.d3pm_nelbo(jnp.zeros((1, K)), jnp.array([MASK]), jnp.array([0]), 0.5, MASK, 0)
