"""The operator against extended precision; the latent and both curricula against each other and against enumeration."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from brute_force import FALSE_ALARM, assert_distributed, exact_operator, histogram, uniform_marginal
from scipy import integrate, stats

from duo_jax.diffusion import duality
from duo_jax.diffusion.order_statistics import distinct_others, normals_from_gaps, shuffle_prefix, top_normals
from duo_jax.diffusion.special import log_mean_exp_below, log_scaled_upper_tail
from duo_jax.errors import UserError

VOCABULARIES = [2, 3, 10, 100, 1000, 30_522, 50_258, 1_000_000]
GAMMAS = np.float32(np.linspace(-6.0, 6.0, 121))


def mpmath_operator(gamma, k):
    """T(gamma) and T'(gamma) from the definition with 30 digits."""
    with mpmath.workdps(30):
        gamma = mpmath.mpf(float(gamma))

        def alpha(gamma):
            mu = mpmath.exp(-gamma / 2)
            pieces = np.linspace(-10, 12, 12).tolist()
            win = mpmath.quad(lambda u: mpmath.npdf(u) * mpmath.ncdf(mu + u) ** (k - 1), pieces, maxdegree=6)
            return (k * win - 1) / (k - 1)

        step = mpmath.mpf("1e-8")
        return float(alpha(gamma)), float((alpha(gamma + step) - alpha(gamma - step)) / (2 * step))


@pytest.mark.parametrize("k", VOCABULARIES)
def test_the_yardstick_against_mpmath(k):
    gammas = np.array([-4.5, -2.25, 0.5])
    alpha, dalpha = zip(*(mpmath_operator(gamma, k) for gamma in gammas), strict=True)
    ours = exact_operator(gammas, k)
    np.testing.assert_allclose(ours[0], alpha, rtol=1e-9)
    np.testing.assert_allclose(ours[1], dalpha, rtol=1e-9)


@pytest.mark.parametrize("k", VOCABULARIES)
def test_operator_and_derivative(k):
    """1e-5 relative in float32 wherever alpha > 1e-6; alpha' where it exceeds 1e-30, near float32's end."""
    alpha, dalpha = exact_operator(GAMMAS, k)
    ours = np.float64(jax.jit(duality.alpha, static_argnums=1)(GAMMAS, k))
    slopes = np.float64(jax.jit(duality.dalpha, static_argnums=1)(GAMMAS, k))
    differentiated = np.float64(jax.vmap(jax.grad(lambda gamma: duality.alpha(gamma, k)))(GAMMAS))
    seen = alpha > 1e-6
    assert seen.sum() > 60
    np.testing.assert_allclose(ours[seen], alpha[seen], rtol=1e-5)
    seen &= np.abs(dalpha) > 1e-30
    np.testing.assert_allclose(slopes[seen], dalpha[seen], rtol=1e-5)
    np.testing.assert_allclose(differentiated[seen], dalpha[seen], rtol=1e-5)
    assert np.all(np.diff(ours) <= 0)
    assert np.isfinite(slopes).all()


def test_operator_in_float64_is_exact():
    with jax.enable_x64(True):
        for k in (2, 1000, 50_258):
            alpha, dalpha = exact_operator(GAMMAS, k)
            np.testing.assert_allclose(duality.alpha(jnp.float64(GAMMAS), k), alpha, rtol=1e-10)
            np.testing.assert_allclose(duality.dalpha(jnp.float64(GAMMAS), k), dalpha, rtol=1e-9)


def test_operator_of_two_tokens_has_a_closed_form():
    """K = 2: two normals are compared, so T = erf(mu / 2)."""
    expected = jax.lax.erf(0.5 * jnp.exp(-0.5 * GAMMAS))
    np.testing.assert_allclose(duality.alpha(GAMMAS, 2), expected, rtol=3e-6)


@pytest.mark.parametrize(("name", "k"), [("gpt2", 50_257), ("bert-base-uncased", 30_522)])
def test_operator_against_the_reference(golden, name, k):
    vectors = golden("e_t_operator")
    gamma, span = np.float32(vectors[f"{name}/gamma"]), np.ptp(vectors[f"{name}/gamma"])
    # Exact at the float64 gamma: rounding gamma to float32 moves both by up to 3e-7.
    np.testing.assert_allclose(duality.alpha(gamma, k), vectors[f"{name}/alpha_exact"], rtol=1e-5)
    np.testing.assert_allclose(duality.dalpha(gamma, k) * span, vectors[f"{name}/dalpha_exact"], rtol=1e-5)
    # The reference's table is right to 2e-5 and 5e-5; its finite difference is not a yardstick.
    np.testing.assert_allclose(duality.alpha(gamma, k), vectors[f"{name}/alpha_cached"], atol=5e-5)


def test_extreme_gammas_are_finite():
    for gamma in (-60.0, -14.0, 14.0, 60.0):
        value, slope = jax.value_and_grad(duality.alpha)(gamma, 1000)
        assert 0 <= value <= 1 + 1e-6
        assert np.isfinite([slope, duality.dalpha(gamma, 1000)]).all()


@pytest.mark.parametrize("gamma", [-2, jnp.asarray(-2.0, jnp.bfloat16)])
def test_a_noise_level_is_computed_with_in_float32_whatever_its_type(gamma):
    for fn in (duality.signal_and_noise, lambda g: duality.alpha(g, 10), lambda g: duality.dalpha(g, 10)):
        for got, wanted in zip(jax.tree.leaves(fn(gamma)), jax.tree.leaves(fn(-2.0)), strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_array_equal(got, wanted)


def test_latent_against_the_reference(golden):
    vectors = golden("i_curriculum")
    x, gamma, eps = (jnp.asarray(vectors[f"gauss_{name}"]) for name in ("x0", "gamma", "eps"))
    np.testing.assert_allclose(duality.latent_from_noise(eps, x, gamma), vectors["gauss_xt"], atol=1e-6)
    np.testing.assert_allclose(duality.latent_from_noise(eps, x, gamma - 0.3), vectors["traj_xs"], atol=1e-6)


@pytest.mark.parametrize(("k", "gamma"), [(2, 0.0), (5, -1.0), (30, -2.5), (300, -1.5)])
def test_argmax_of_the_latent_is_the_discrete_process(k, gamma):
    w = duality.gaussian_latent(jax.random.key(k), jnp.full((100, 400), 1), gamma, k)
    alpha = float(duality.alpha(gamma, k))
    assert_distributed(histogram(w.argmax(-1), k), uniform_marginal(alpha, 1, k))


@pytest.mark.parametrize(("k", "top"), [(2, 1), (2, 2), (5, 1), (5, 3), (5, 5), (30, 4), (300, 1), (300, 5)])
@pytest.mark.parametrize("gamma", [-2.5, -0.5])
def test_efficient_curriculum_has_the_discrete_marginal(k, top, gamma):
    weights, ids, z_t = tempered(k + top, jnp.full((300, 200), 1), gamma, 0.2, top, k)
    assert weights.shape == ids.shape == (300, 200, top)
    assert_distributed(histogram(z_t, k), uniform_marginal(float(duality.alpha(gamma, k)), 1, k))
    np.testing.assert_array_equal(z_t, ids[..., 0])
    assert np.all(np.diff(weights, axis=-1) <= 0)
    assert np.all(weights.sum(-1) <= 1 + 1e-5)


def tempered(seed, x, gamma, tau, top, k):
    draw = jax.jit(duality.tempered_topk, static_argnums=(4, 5))
    return jax.tree.map(np.asarray, draw(jax.random.key(seed), x, gamma, tau, top, k))


@pytest.mark.parametrize(("k", "top"), [(6, 4), (9, 9), (40, 3)])
def test_efficient_curriculum_ids_are_distinct_and_exchangeable(k, top):
    x = 2
    _, ids, _ = tempered(0, jnp.full((300, 200), x), -1.0, 0.3, top, k)
    assert np.all(np.diff(np.sort(ids, axis=-1), axis=-1) > 0)
    assert ids.min() >= 0
    assert ids.max() < k
    others = np.where(np.arange(k) == x, 0, 1 / (k - 1))
    for slot in range(top):
        chosen = ids[..., slot]
        assert_distributed(histogram(chosen[chosen != x], k), others)
    # Pairs too: the first two slots, where neither is x, hold every ordered pair of others alike.
    first, second = ids[..., 0].ravel(), ids[..., 1].ravel()
    free = (first != x) & (second != x)
    pairs = np.outer(others, others) * ~np.eye(k, dtype=bool)
    assert_distributed(histogram(first[free] * k + second[free], k * k), pairs / pairs.sum())


@pytest.mark.parametrize(
    ("k", "top", "gamma", "tau"),
    [
        (2, 1, 0.0, 0.5),
        (6, 3, -1.0, 0.5),
        (33, 5, -2.0, 0.2),
        (400, 5, -2.0, 0.05),
        (400, 2, -2.0, 0.3),
        (400, 5, -1.0, 2.0),
    ],
)
def test_efficient_curriculum_weights_follow_the_full_softmax(k, top, gamma, tau):
    """Kolmogorov and Smirnov's test of every slot's weight, of the true token's, and of what is left out."""
    x = jnp.full((100, 200), 1)
    weights, ids, _ = tempered(7, x, gamma, tau, top, k)
    full = duality.tempered_softmax(duality.gaussian_latent(jax.random.key(8), x, gamma, k), tau)
    full_weights, full_ids = (np.asarray(v) for v in jax.lax.top_k(full, top))
    pairs = [(weights[..., slot], full_weights[..., slot]) for slot in range(top)]
    pairs.append((np.where(ids == 1, weights, 0).sum(-1), np.where(full_ids == 1, full_weights, 0).sum(-1)))
    if top < k:
        pairs.append((1 - weights.sum(-1), 1 - full_weights.sum(-1)))
    for ours, theirs in pairs:
        assert stats.ks_2samp(ours.ravel(), theirs.ravel()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("k", [20, 50_258])
@pytest.mark.parametrize("top", [1, 5])
def test_efficient_curriculum_compiled_at_the_papers_temperature(k, top):
    """1 / tau = 1000 magnifies whatever the compiler rounds apart: the weights' sum is one, and no more."""
    x = jnp.full((100, 200), 1)
    weights, ids, z_t = jax.jit(duality.tempered_topk, static_argnums=(4, 5))(
        jax.random.key(9), x, jnp.full(100, -2.7), 1e-3, top, k
    )
    assert float(jnp.max(weights.sum(-1))) <= 1 + 1e-6
    assert float(jnp.max(weights)) <= 1.0
    assert (weights[..., :1] >= weights).all()
    np.testing.assert_array_equal(ids[..., 0], z_t)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_small_vocabularies_are_drawn_whole(k):
    assert duality.n_visible_entries(1e-3, -3.5, k, k // 8) is None


@pytest.mark.parametrize(
    ("k", "gamma", "tau"), [(50, -2.0, 1e-3), (400, -2.5, 3e-3), (3000, -3.5, 1e-3), (3000, -1.0, 1e-2)]
)
def test_visible_entries_hold_the_whole_softmax(k, gamma, tau):
    """What lies beyond them adds up to less than 2^-24; two would not do; the slots follow the dense softmax."""
    m = duality.n_visible_entries(tau, gamma, k, k)
    assert m < k
    x = jnp.full((20, 200), 1)
    w = np.float64(duality.gaussian_latent(jax.random.key(3), x, gamma, k))
    full = np.sort(np.exp((w - w.max(-1, keepdims=True)) / tau), axis=-1)[..., ::-1]
    full /= full.sum(-1, keepdims=True)
    assert full[..., m:].sum(-1).max() < 2.0**-24
    assert full[..., 2:].sum(-1).max() > 2.0**-24
    weights, ids, _ = tempered(4, x, gamma, tau, m, k)
    # An exponent w / tau is as exact as float32 is about w, which numerator and denominator may round each in its way.
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=np.spacing(np.float32(np.abs(w).max())) / tau)
    true = np.take_along_axis(np.exp((w - w.max(-1, keepdims=True)) / tau), np.asarray(x)[..., None], -1)[..., 0]
    pairs = [(weights[..., slot], full[..., slot]) for slot in range(3)]
    pairs.append((np.where(ids == 1, weights, 0).sum(-1) / weights[..., 0], true))
    for ours, theirs in pairs:
        # Most are 0 or 1 but for digits that float32 does not have.
        assert stats.ks_2samp(ours.ravel().round(3), theirs.ravel().round(3)).pvalue > FALSE_ALARM


def test_visible_entries_are_only_counted_up_to_a_limit():
    assert duality.n_visible_entries(0.1, -3.55, 50_257, 64) is None
    assert duality.n_visible_entries(1e-3, -3.55, 50_257, 64) == 31
    assert duality.n_visible_entries(1e-3, -3.55, 50_257, 30) is None
    assert duality.n_visible_entries(1e-3, -3.55, 2, 2) == 2


def test_efficient_curriculum_never_builds_the_vocabulary():
    x = jnp.zeros((4, 8), int)
    jaxpr = jax.make_jaxpr(lambda key, gamma, tau: duality.tempered_topk(key, x, gamma, tau, 5, 50_258))(
        jax.random.key(0), -2.0, 1e-3
    )

    def largest(jaxpr):
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        inner = (getattr(p, "jaxpr", p) for eqn in jaxpr.eqns for p in eqn.params.values())
        return max([*sizes, *(largest(p) for p in inner if hasattr(p, "eqns"))])

    assert largest(jaxpr.jaxpr) < 50_258


@pytest.mark.parametrize(("k", "draws"), [(33, 3), (34, 4)])
def test_no_two_draws_of_the_efficient_curriculum_share_a_key(k, draws, monkeypatch):
    """Of the true token, the others, which they are, and the sum of those beyond 32, of which the smaller K has none."""
    used = []

    def noted(draw):
        def fn(key, *args):
            used.append(jax.random.key_data(key))
            return draw(key, *args)

        return fn

    for name in ("normal", "exponential", "randint"):
        monkeypatch.setattr(jax.random, name, noted(getattr(jax.random, name)))

    @jax.jit
    def keys(key):
        duality.tempered_topk(key, jnp.zeros((1, 2), int), -1.0, 0.1, 3, k)
        return used

    found = [tuple(key.tolist()) for key in keys(jax.random.key(0))]
    assert len(found) == len(set(found)) == draws


def test_temperature_and_noise_are_traced():
    traces = []

    @jax.jit
    def draw(gamma, tau):
        traces.append(1)
        return duality.tempered_topk(jax.random.key(0), jnp.zeros((2, 3), int), gamma, tau, 2, 1000)

    for gamma, tau in [(-3.0, 1e-3), (-2.0, 0.1), (-1.0, 1e-10)]:
        weights, _, _ = draw(jnp.array([gamma, -1.0]), tau)
        assert np.isfinite(weights).all()
    assert len(traces) == 1
    np.testing.assert_allclose(weights[..., 0], 1.0)  # in the limit the input is the one-hot z_t


def test_largest_normals():
    """The k-th largest of n normals, by its exact distribution function, for few and for many normals."""
    draw = jax.jit(top_normals, static_argnums=(1, 2, 3))
    for n, k in [(1, 1), (2, 2), (7, 7), (50_257, 4), (999_999, 2)]:
        values = np.float64(draw(jax.random.key(n), (20_000,), n, k))
        assert np.all(np.diff(values, axis=-1) <= 0)
        for place in range(k):
            # P(k-th largest <= v) is a binomial tail, here as a beta distribution function of Phi(v).
            uniform = stats.beta.cdf(stats.norm.sf(values[:, place]), place + 1, n - place)
            assert stats.kstest(uniform, "uniform").pvalue > FALSE_ALARM


def test_order_statistics_against_the_reference(golden):
    """The reference's uniforms give our normals: its weights without x differ by exp((w_i - w_j) / tau)."""
    vectors = golden("i_curriculum")
    gaps = -np.log(vectors["topk_rand"])
    z = np.float64(normals_from_gaps(jnp.float32(gaps), 52))
    ids, weights = vectors["topk_indices"], vectors["topk_softmax"]
    sigma, compared = vectors["topk_sigma"], 0
    for b in range(3):
        for l in range(5):
            if vectors["topk_x0"][b, l] in ids[b, l]:
                continue
            ratios = np.log(weights[b, l] / weights[b, l, :1])
            np.testing.assert_allclose(ratios, 10.0 * sigma[b] * (z[b, l] - z[b, l, :1]), atol=1e-4)
            compared += 1
    assert compared > 0


def test_shuffle_prefix_is_a_shuffle():
    partners = np.stack([np.random.default_rng(0).integers(j, 9, 500) for j in range(7)], axis=-1)
    expected = np.tile(np.arange(9), (500, 1))
    for j in range(7):
        for row in range(500):
            expected[row, [j, partners[row, j]]] = expected[row, [partners[row, j], j]]
    np.testing.assert_array_equal(shuffle_prefix(jnp.asarray(partners, jnp.int32)), expected[:, :7])
    ids = distinct_others(jax.random.key(0), jnp.array([0, 4]), 4, 5)
    np.testing.assert_array_equal(np.sort(ids, axis=-1), [[1, 2, 3, 4], [0, 1, 2, 3]])


@pytest.mark.parametrize(("ceiling", "scale", "n"), [(1.0, 0.7, 3), (-0.5, 2.0, 40), (4.0, 3.0, 300)])
def test_the_sum_of_the_rest_is_log_normal_with_the_two_moments_of_a_sum(ceiling, scale, n):
    def mean_of_power(power):
        top, _ = integrate.quad(lambda v: stats.norm.pdf(v, scale=scale) * np.exp(power * v), -12 * scale, ceiling)
        return top / stats.norm.cdf(ceiling / scale)

    mean, variance = n * mean_of_power(1), n * (mean_of_power(2) - mean_of_power(1) ** 2)
    spread = np.log1p(variance / mean**2)
    draws = ceiling + duality._log_rest(jax.random.key(0), jnp.full(20_000, ceiling / scale), jnp.float32(scale), n)
    expected = stats.norm(np.log(mean) - 0.5 * spread, spread**0.5)
    assert stats.kstest(np.float64(draws), expected.cdf).pvalue > FALSE_ALARM


def test_truncated_mean(golden):
    for y in (0.0, 1.0, 4.9, 5.1, 20.0, 1000.0):
        with mpmath.workdps(40):
            expected = float(mpmath.log(mpmath.erfc(mpmath.mpf(y) / mpmath.sqrt(2)) / 2) + mpmath.mpf(y) ** 2 / 2)
        np.testing.assert_allclose(log_scaled_upper_tail(jnp.float32(y)), expected, rtol=2e-6)
    vectors = golden("i_curriculum")
    for scale in ("0.5", "1.0", "300.0"):
        ceiling = vectors[f"lme_c_{scale}"]
        ours = ceiling + np.float64(log_mean_exp_below(jnp.float32(ceiling / float(scale)), jnp.float32(scale)))
        np.testing.assert_allclose(ours, vectors[f"lme_{scale}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e3, 1e9])
def test_truncated_mean_beside_the_ceiling(scale):
    """Against 40 digits, for ceilings from the far lower tail to the upper one."""
    a = np.float32([-6.0, -1.0, -1e-3, 0.0, 1e-3, 0.5, 3.0, 5.5])
    ours = log_mean_exp_below(jnp.asarray(a), jnp.float32(scale))
    with mpmath.workdps(40):
        scale = mpmath.mpf(float(np.float32(scale)))
        log_ndtr = lambda z: mpmath.log(mpmath.erfc(-z / mpmath.sqrt(2)) / 2)  # noqa: E731
        expected = [
            float(scale**2 / 2 + log_ndtr(z - scale) - log_ndtr(z) - z * scale) for z in map(mpmath.mpf, a.tolist())
        ]
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tau", [3e-9, 1e-10])
def test_a_temperature_near_zero_leaves_the_largest_entry(tau):
    """Compiled with tau as a constant, too, with which a compiler may multiply by 1 / tau instead."""
    draw = jax.jit(lambda key: duality.tempered_topk(key, jnp.zeros((1, 20_000), jnp.int32), -2.7, tau, 3, 50_257)[0])
    weights = np.asarray(draw(jax.random.key(0)))
    assert np.isfinite(weights).all()
    np.testing.assert_allclose(weights[..., 0], 1.0, atol=1e-3)


def test_temperature_schedule_against_the_reference(golden):
    vectors = golden("i_curriculum")
    settings = [(0, 500_000, -3.0, -3.0), (100_000, 200_000, -1.0, -2.0), (10, 30, -1.0, -3.0)]
    for n, setting in enumerate(settings):
        ours = jax.jit(lambda step, setting=setting: duality.tau(step, *setting))(vectors[f"tau{n}_steps"])
        np.testing.assert_allclose(1 / np.float64(ours), vectors[f"tau{n}_inverse"], rtol=1e-4)


def test_a_curriculum_may_end_where_it_starts():
    np.testing.assert_allclose(duality.tau(np.array([4, 5, 6]), 5, 5), [1e-3, 1e-10, 1e-10], rtol=1e-6)


def test_mistakes_are_told():
    x = jnp.zeros((1, 2), int)
    for k in (0, 8):
        with pytest.raises(UserError, match="k must lie between 1 and the vocabulary size 7"):
            duality.tempered_topk(jax.random.key(0), x, -1.0, 0.1, k, 7)
    with pytest.raises(UserError, match="vocab_size"):
        duality.alpha(0.0, 1)
    with pytest.raises(UserError, match="before it starts"):
        duality.tau(0, 10, 5)
