"""The uniform-state process against enumeration, and its NELBO against the published formula in extended precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import assert_distributed, histogram, published_nelbo, softmax, uniform_marginal

from duo_jax.diffusion import uniform
from duo_jax.diffusion.arrays import token_keys
from duo_jax.errors import UserError

ALPHAS = [1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1 - 1e-3]


@pytest.mark.parametrize("k", [2, 7, 50])
@pytest.mark.parametrize("alpha", [0.0, 0.02, 0.6, 1.0])
def test_forward_process(k, alpha):
    z = uniform.q_sample(jax.random.key(k), jnp.full((300, 200), 1), alpha, k)
    assert_distributed(histogram(z, k), uniform_marginal(alpha, 1, k))


def test_forward_process_takes_alpha_in_every_shape():
    x = jnp.zeros((400, 100), int)
    levels = jnp.linspace(0.0, 1.0, 400)
    for alpha in (levels, levels[:, None], jnp.broadcast_to(levels[:, None], x.shape)):
        kept = np.mean(np.asarray(uniform.q_sample(jax.random.key(0), x, alpha, 1000)) == 0, axis=1)
        assert np.max(np.abs(kept - levels - (1 - levels) / 1000)) < 5 * 0.05
    assert uniform.q_sample(jax.random.key(0), x, 0.5, 10).dtype == jnp.int32


def bayes(p, z_t, alpha_s, alpha_t):
    """q(z_s | z_t) [K] by Bayes' rule from the two forward kernels, x ~ p."""
    k = len(p)
    prior_s = sum(p[x] * uniform_marginal(alpha_s, x, k) for x in range(k))
    joint = np.array([prior_s[j] * uniform_marginal(alpha_t / alpha_s, j, k)[z_t] for j in range(k)])
    return joint / joint.sum()


CASES = [(0.9, 0.3), (1.0, 0.5), (0.02, 0.01), (0.999, 0.998), (1.0, 0.001)]


@pytest.mark.parametrize(("alpha_s", "alpha_t"), CASES)
@pytest.mark.parametrize("k", [2, 6])
def test_posterior_is_bayes_rule(k, alpha_s, alpha_t):
    rng = np.random.default_rng(k)
    p = np.concatenate([np.float64(softmax(rng.normal(size=(4, k)))), np.eye(k)[[0, 1]]])
    z_t = np.array([0, 1, 0, 1, 1, 1])
    alpha_s, alpha_t = np.float32(alpha_s), np.float32(alpha_t)
    table = uniform.posterior(jnp.float32(p)[None], jnp.asarray(z_t)[None], alpha_s, alpha_t)[0]
    expected = np.stack([bayes(p[n], z_t[n], float(alpha_s), float(alpha_t)) for n in range(6)])
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha_s", "alpha_t"), CASES)
@pytest.mark.parametrize("k", [2, 6, 40])
def test_step_draws_from_the_posterior(k, alpha_s, alpha_t):
    rng = np.random.default_rng(k)
    for p, z_t in [(np.float64(softmax(2 * rng.normal(size=k))), 1), (np.eye(k)[0], 1), (np.eye(k)[1], 1)]:
        log_p = jnp.broadcast_to(jnp.float32(np.log(np.maximum(p, 1e-35))), (200, 200, k))
        z_s = jax.jit(uniform.step)(jax.random.key(1), log_p, jnp.full((200, 200), z_t), alpha_s, alpha_t)
        expected = bayes(p, z_t, alpha_s, alpha_t)
        assert_distributed(histogram(z_s, k), np.where(expected < 1e-20, 0, expected))


@pytest.mark.parametrize("kappa", [1.0, 0.95, 0.3, 0.0])
@pytest.mark.parametrize(("alpha_s", "alpha_t"), [*CASES, (0.5 + 1e-6, 0.5)])
def test_where_a_step_does_not_ask_the_prediction_has_no_say(alpha_s, alpha_t, kappa):
    n, k = 50_000, 6
    keys, z_t = jax.jit(token_keys, static_argnums=1)(jax.random.key(2), (n,)), jnp.full(n, 4)
    draw = jax.jit(uniform.draw_without_prediction, static_argnums=5)
    needs_prediction, z_s = (np.asarray(x) for x in draw(keys, z_t, alpha_s, alpha_t, kappa, k))
    answers = []
    for favourite in (4, 1):
        logits = jnp.broadcast_to(10.0 * jax.nn.one_hot(favourite, k), (n, k))
        answers.append(np.asarray(jax.jit(uniform.mixture_step)(keys, logits, z_t, alpha_s, alpha_t, kappa)))
        np.testing.assert_array_equal(answers[-1][~needs_prediction], z_s[~needs_prediction])
    # And it asks no more often than the least and the most of a posterior's staying differ: p_i = 0 decides the least.
    jump = (alpha_s - alpha_t) / alpha_s
    expected = n * (kappa * jump / (1 - alpha_t) + (1 - kappa) * alpha_s)
    assert abs(needs_prediction.sum() - expected) < 5 * np.sqrt(expected) + 1e-9
    if expected > 1000:
        assert (answers[0] != answers[1]).any()


def test_a_short_steps_jump_keeps_its_digits():
    alpha_t = np.float32(0.3)
    alpha_s = alpha_t + np.float32([1e-7, 1e-6, 1e-4, 0.1])
    exact = (np.float64(alpha_s) - alpha_t) / alpha_s
    np.testing.assert_allclose(uniform._jump(jnp.asarray(alpha_s), jnp.asarray(alpha_t)), exact, rtol=1e-6)


def test_step_from_logits_is_the_same_in_chunks():
    logits, keys = 2 * jax.random.normal(jax.random.key(0), (12, 30)) + 9, token_keys(jax.random.key(1), (12,))
    z_t, alpha_s, alpha_t = jnp.arange(12), jnp.linspace(0.6, 0.9, 12), jnp.linspace(0.1, 0.5, 12)
    mixture_step = jax.jit(uniform.mixture_step)
    whole = mixture_step(keys, logits, z_t, alpha_s, alpha_t)
    cuts = [slice(i, i + 4) for i in (0, 4, 8)]
    pieces = [mixture_step(keys[c], logits[c], z_t[c], alpha_s[c], alpha_t[c]) for c in cuts]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))
    # Where nothing may change, nothing does: no time passes, or the network is certain of the token that is there.
    np.testing.assert_array_equal(mixture_step(keys, logits, z_t, alpha_t, alpha_t), z_t)
    np.testing.assert_array_equal(mixture_step(keys, logits, z_t, jnp.zeros(12), jnp.zeros(12)), z_t)
    certain = jnp.where(jax.nn.one_hot(z_t, 30) > 0, 0.0, -jnp.inf)
    np.testing.assert_array_equal(mixture_step(keys, certain, z_t, jnp.ones(12), alpha_t), z_t)


def test_posterior_against_the_reference(golden):
    vectors = golden("d_posteriors")
    with jax.enable_x64(True):
        p, z_t = jnp.asarray(vectors["p_x0"]), jnp.asarray(vectors["xt"])
        alpha_s, alpha_t = (jnp.asarray(np.float64(vectors[name])) for name in ("alpha_s", "alpha_t"))
        exact = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
        exact(uniform.posterior(p, z_t, alpha_s, alpha_t), vectors["duo_posterior_f64_alphas"])
        np.testing.assert_allclose(uniform.posterior(p, z_t, 1.0, alpha_t), vectors["duo_posterior_s0"], atol=1e-6)
        per_position = (jnp.asarray(np.float64(vectors[f"alpha_{v}_perpos"])) for v in "st")
        np.testing.assert_allclose(uniform.posterior(p, z_t, *per_position), vectors["duo_posterior_perpos"], atol=1e-6)


@pytest.mark.parametrize("kappa", ["0.0", "0.3", "0.95", "1.0"])
def test_psi_step_against_the_reference(golden, kappa):
    vectors = golden("d_posteriors")
    for b, l in [(0, 0), (1, 1), (2, 3), (3, 5)]:
        logits = jnp.broadcast_to(jnp.float32(np.log(vectors["p_x0"][b, l])), (40_000, 53))
        z_t = jnp.full(40_000, vectors["xt"][b, l])
        alpha_s, alpha_t = vectors["alpha_s"][b, 0], vectors["alpha_t"][b, 0]
        keys = token_keys(jax.random.key(b), (40_000,))
        z_s = jax.jit(uniform.mixture_step)(keys, logits, z_t, alpha_s, alpha_t, float(kappa))
        assert_distributed(histogram(z_s, 53), vectors[f"psi_duo_kappa{kappa}"][b, l])


def random_case(k, scale, n=24, confident=False):
    rng = np.random.default_rng(k)
    logits = np.float32(scale * rng.normal(size=(n, k)))
    x = rng.integers(0, k, n)
    z_t = np.where(np.arange(n) % 2 == 0, x, (x + rng.integers(1, k, n)) % k)
    if confident:
        logits[np.arange(n), x] += 8
    return logits, z_t, x


@pytest.mark.parametrize("k", [2, 5, 53, 1000, 50_258])
@pytest.mark.parametrize(("scale", "confident"), [(0.0, False), (0.05, False), (1.0, False), (1.0, True), (6.0, False)])
def test_nelbo_keeps_its_digits_in_float32(k, scale, confident):
    """1e-4 is asked for; 1e-5 is kept, for alpha in [1e-3, 1 - 1e-3], z_t = x or not, networks vague or sure."""
    logits, z_t, x = random_case(k, scale, n=12 if k > 10_000 else 24, confident=confident)
    evaluate = jax.jit(uniform.nelbo_from_logits)
    for alpha in np.float32(ALPHAS):
        f = np.float64(evaluate(logits, z_t, x, alpha, np.float32(-0.999)))
        expected = published_nelbo(softmax(logits), z_t, x, np.full(len(x), alpha), np.float32(-0.999))
        # The printed formula's own rounding, in long double: terms of order K / (1 - alpha) cancel.
        own = 1e-15 * k / (1 - alpha) / alpha
        assert np.all(np.abs(f - expected) <= 1e-5 * np.abs(expected) + own), alpha
        assert np.all(f >= 0)


def test_nelbo_of_log_probabilities_in_every_alpha_shape():
    logits, z_t, x = random_case(9, 1.0, n=12)
    log_p = jax.nn.log_softmax(logits).reshape(3, 4, 9)
    z_t, x = z_t.reshape(3, 4), x.reshape(3, 4)
    alpha = jnp.array([0.2, 0.5, 0.8])
    per_token = jnp.broadcast_to(alpha[:, None], (3, 4))
    expected = published_nelbo(softmax(log_p), z_t, x, np.asarray(per_token), np.full((3, 4), -0.7))
    for shaped in (alpha, alpha[:, None], per_token):
        np.testing.assert_allclose(uniform.nelbo(log_p, z_t, x, shaped, -0.7), np.float64(expected), rtol=1e-5)


def test_nelbo_against_the_reference(golden):
    vectors = golden("b_losses")
    tokens = jnp.asarray(vectors["xt"]), jnp.asarray(vectors["x0"])
    with jax.enable_x64(True):
        arguments = [jnp.asarray(vectors[name]) for name in ("alpha_t", "dalpha_t")]
        f = uniform.nelbo(jnp.asarray(vectors["log_x_theta_f64"]), *tokens, *arguments)
        np.testing.assert_allclose(f, vectors["duo_nll_f64"], rtol=1e-9, atol=1e-9)
    arguments = [jnp.float32(vectors[name]) for name in ("alpha_t", "dalpha_t")]
    f = uniform.nelbo_from_logits(jnp.float32(vectors["logits"]), *tokens, *arguments)
    # Against the exact loss of the same float32 inputs, not the reference's own float32.
    exact = published_nelbo(
        softmax(np.float32(vectors["logits"])),
        vectors["xt"],
        vectors["x0"],
        np.broadcast_to(arguments[0], f.shape),
        np.asarray(arguments[1]),
    )
    np.testing.assert_allclose(f, np.float64(exact), rtol=1e-5)


def printed(logits, z_t, x, alpha, dalpha):
    """The printed formula once more, for jax to differentiate in float64."""
    k, p, noise = logits.shape[-1], jax.nn.softmax(logits), 1 - alpha
    pbar = k * alpha * p + noise
    zeta = noise / (k * alpha + noise)
    log_sum = jnp.sum(jnp.log(pbar[z_t] / pbar))
    same = (k - 1) * zeta * jnp.log(zeta) + zeta * log_sum
    other = log_sum + k * alpha / noise * jnp.log(pbar[z_t] / pbar[x]) - jnp.log(zeta) / zeta
    xbar = jnp.where(z_t == x, k * alpha + noise, noise)
    return dalpha / (k * alpha) * (k * (1 / xbar - 1 / pbar[z_t]) - jnp.where(z_t == x, same, other))


@pytest.mark.parametrize("k", [2, 3, 30])
def test_nelbo_gradients_are_the_formulas(k):
    logits, z_t, x = random_case(k, 1.5, n=6)
    with jax.enable_x64(True):
        logits = jnp.asarray(np.float64(logits))
        ours = jax.jit(jax.grad(lambda l, a, d: uniform.nelbo_from_logits(l, z_t, x, a, d).sum(), (0, 1, 2)))
        theirs = jax.jit(jax.grad(lambda l, a, d: jax.vmap(printed)(l, z_t, x, a, d).sum(), (0, 1, 2)))
        for alpha in (0.01, 0.4, 0.97):
            arguments = [jnp.full(6, alpha), jnp.full(6, -0.8)]
            for got, expected in zip(ours(logits, *arguments), theirs(logits, *arguments), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("k", [2, 50])
def test_nelbo_is_finite_at_every_extreme(k):
    onehot = jax.nn.one_hot(jnp.array([0, 0, 1, 1, 0]), k)
    z_t, x = jnp.array([0, 1, 0, 1, 1]), jnp.array([0, 0, 0, 0, 1])
    evaluate = jax.jit(
        jax.value_and_grad(lambda l, a, d: uniform.nelbo_from_logits(l, z_t, x, a, d).sum(), argnums=(0, 1, 2))
    )
    for logits in (jnp.zeros((5, k)), 1e4 * onehot, -1e4 * onehot, jnp.where(onehot > 0, 0.0, -jnp.inf), 30 * onehot):
        for alpha in (0.0, 1e-12, 1e-3, 0.5, 1 - 1e-3, 1 - 6e-8, 1.0):
            loss, gradients = evaluate(logits, jnp.full(5, alpha), jnp.full(5, -0.999))
            assert np.isfinite(loss)
            assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_nelbo_of_half_precision_logits_and_levels():
    logits, z_t, x = random_case(20, 1.0)
    half, alpha = jnp.asarray(logits, jnp.bfloat16), jnp.asarray(0.3, jnp.bfloat16)
    loss, gradient = jax.value_and_grad(lambda l: uniform.nelbo_from_logits(l, z_t, x, alpha, -1.0).sum())(half)
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    wide = uniform.nelbo_from_logits(np.float32(half), z_t, x, np.float32(alpha), -1.0)
    np.testing.assert_allclose(loss, wide.sum(), rtol=1e-6)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="vocab_size must be at least 2"):
        uniform.q_sample(jax.random.key(0), jnp.zeros((1, 1), int), 0.5, 1)
    for z_t, x in [((2, 3), (2, 4)), ((2, 4), (2, 4)), ((2, 1), (2, 1))]:
        with pytest.raises(UserError, match="same tokens"):
            uniform.nelbo(jnp.zeros((2, 3, 5)), jnp.zeros(z_t, int), jnp.zeros(x, int), 0.5, -1.0)
