"""Draws from softmax(logits), nucleus filtering and cross-entropy against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import assert_distributed, histogram, softmax

from duo_jax.diffusion import categorical
from duo_jax.diffusion.arrays import per_token, token_keys
from duo_jax.errors import UserError


def draws(seed, logits, n):
    keys = token_keys(jax.random.key(seed), (n,))
    logits = jnp.asarray(logits, jnp.float32)
    return np.asarray(jax.jit(jax.vmap(categorical.draw, in_axes=(0, None)))(keys, logits))


@pytest.mark.parametrize("k", [2, 3, 9, 10, 17, 500])
def test_draw_follows_the_softmax(k):
    logits = 2.0 * np.random.default_rng(k).normal(size=k) - 30.0
    assert_distributed(histogram(draws(k, logits, 100_000), k), softmax(logits))


def test_draw_of_rare_tokens():
    """200 tokens of 2e-5 and a near-certain one, which share blocks: 4e-3 in all, each at its own rate."""
    logits = np.full(300, -np.inf)
    logits[7], logits[50:250] = 0.0, np.log(2e-5)
    ids = draws(0, logits, 400_000)
    counts = histogram(ids, 300)
    assert_distributed(
        [counts[50:150].sum(), counts[150:250].sum(), counts[7]], [2e-3 / 1.004, 2e-3 / 1.004, 1 / 1.004]
    )
    assert counts[np.isinf(logits)].sum() == 0


def test_noise_reaches_beyond_the_float32_grid():
    """Of 3e7 Gumbel draws about 5.4 exceed 15.53; the default ones stop just above, which lowers the temperature."""
    noise = np.concatenate([np.asarray(categorical._gumbel(jax.random.key(s), 10_000_000)) for s in range(3)])
    assert noise.max() > 16.0  # missed by one seed in thirty; the default never gets there
    for level in (8.0, 12.0):
        expected = noise.size * np.exp(-level)
        assert abs(np.sum(noise > level) - expected) < 5 * np.sqrt(expected)


def test_draw_does_not_depend_on_the_cut():
    logits = jax.random.normal(jax.random.key(0), (6, 8, 40))
    keys = token_keys(jax.random.key(1), (6, 8))
    draw = jax.jit(categorical.draw)
    whole = draw(keys, logits)
    pieces = [draw(keys[i, j : j + 4], logits[i, j : j + 4]) for i in range(6) for j in (0, 4)]
    np.testing.assert_array_equal(whole.ravel(), np.concatenate(pieces))
    assert whole.dtype == jnp.int32


def test_draw_returns_the_log_normaliser():
    logits = 5 * jax.random.normal(jax.random.key(0), (4, 5, 50_258))
    keys = token_keys(jax.random.key(1), (4, 5))
    ids, log_normaliser = jax.jit(categorical.draw_with_log_normaliser)(keys, logits)
    np.testing.assert_allclose(log_normaliser, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)
    assert np.all((ids >= 0) & (ids < 50_258))


@pytest.mark.parametrize("offset", [0.0, 60.0, 95.0, 1e4, -40.0, -95.0, -1e4])
@pytest.mark.parametrize("k", [7, 400])
def test_logits_may_be_of_any_size(k, offset):
    """Their exponentials overflow float32 above 88 and vanish below -87."""
    values = np.float32(2.0 * np.random.default_rng(k).normal(size=k) + offset)
    assert_distributed(histogram(draws(k, values, 100_000), k), softmax(values))
    keys = token_keys(jax.random.key(0), (2,))
    both = jnp.stack([values, values - offset])  # one row that is moderate beside one that may not be
    _, log_normaliser = categorical.draw_with_log_normaliser(keys, both)
    np.testing.assert_allclose(log_normaliser, jax.nn.logsumexp(both, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 30.0, -30.0, 200.0, -200.0])
def test_rare_blocks_keep_their_digits(offset):
    """Blocks of 1e-9 and less beside a near-certain token, summed as they are or relative to the largest."""
    values = np.float32(np.random.default_rng(0).normal(size=(3, 400)) - np.linspace(0, 40, 400) + offset)
    found = categorical._block_log_sums(jnp.asarray(values), 20)
    exact = np.log(np.exp(np.float64(values) - offset).reshape(3, 20, 20).sum(-1)) + offset
    kept = exact > exact.max() - np.log(1e12)
    assert 0 < (~kept).sum() < 0.5 * kept.size
    np.testing.assert_allclose(found[kept], exact[kept], rtol=1e-6, atol=1e-5)


def nucleus_by_sorting(logits, top_p):
    """Which tokens stay, and for which float32 cannot tell: those whose mass before them is top_p to 1e-6."""
    p = np.float64(softmax(logits))
    order = np.argsort(-p, axis=-1, kind="stable")
    mass_before = np.zeros(p.shape)
    np.put_along_axis(mass_before, order, np.cumsum(np.take_along_axis(p, order, -1), -1), -1)
    mass_before -= p
    return mass_before <= top_p, np.abs(mass_before - top_p) < (1e-6 if top_p < 1 else 0)


@pytest.mark.parametrize("k", [2, 5, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_nucleus_keeps_what_sorting_keeps(k, top_p):
    logits = np.float32(3 * np.random.default_rng(k).normal(size=(20, 3, k)) + 50)
    filtered = np.asarray(jax.jit(categorical.nucleus)(logits, top_p))
    kept, undecided = nucleus_by_sorting(logits, top_p)
    assert undecided.sum() <= 2
    finite = np.isfinite(filtered)
    np.testing.assert_array_equal(finite | undecided, kept | undecided)
    np.testing.assert_array_equal(filtered[finite], logits[finite])


def test_nucleus_keeps_ties_and_the_impossible():
    filtered = categorical.nucleus(jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2, 0.0])), 0.5)
    np.testing.assert_array_equal(np.isfinite(filtered), [True, True, True, True, False])
    everything = categorical.nucleus(jnp.zeros((3, 50_258)), 1.0)
    assert np.isfinite(everything).all()


def test_nucleus_of_several_thresholds():
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]] * 3))
    kept = np.isfinite(categorical.nucleus(logits, jnp.array([0.5, 0.8, 1.0]))).sum(-1)
    np.testing.assert_array_equal(kept, [1, 2, 3])
    # Sums of 50,258 rounded probabilities may exceed 1, which cuts nothing where all are to stay.
    logits = 3 * jax.random.normal(jax.random.key(1), (16, 50_258))
    kept = np.isfinite(categorical.nucleus(logits, jnp.where(jnp.arange(16) > 0, 1.0, 0.5))).sum(-1)
    np.testing.assert_array_equal(kept[1:], 50_258)
    assert kept[0] < 1000


def test_nucleus_against_the_reference(golden):
    vectors = golden("h_optim")
    for top_p in ("0.9", "0.5", "0.95", "1e-06"):
        filtered = categorical.nucleus(jnp.float32(vectors["nucleus_logp"]), float(top_p))
        expected = vectors[f"nucleus_{top_p}"]
        np.testing.assert_array_equal(np.isfinite(filtered), np.isfinite(expected))
        np.testing.assert_allclose(np.exp(jax.nn.log_softmax(filtered)), np.exp(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("banned", [None, 3])
def test_cross_entropy_and_its_gradient(banned):
    logits = np.random.default_rng(0).normal(size=(4, 6, 9)) * 3
    x = np.random.default_rng(1).choice([0, 1, 2, 4, 5, 8], size=(4, 6))
    with jax.enable_x64(True):

        def plain(logits):
            masked = logits if banned is None else logits.at[..., banned].set(-1e6)
            return -jnp.take_along_axis(jax.nn.log_softmax(masked), x[..., None], axis=-1)[..., 0]

        values = jnp.asarray(logits)
        np.testing.assert_allclose(categorical.nll(values, x, banned), plain(values), rtol=1e-12)
        weights = jnp.asarray(np.random.default_rng(2).normal(size=(4, 6)))
        gradient = jax.grad(lambda l: jnp.sum(weights * categorical.nll(l, x, banned)))(values)
        np.testing.assert_allclose(gradient, jax.grad(lambda l: jnp.sum(weights * plain(l)))(values), atol=1e-12)
    extreme = jnp.array([[1e4, -1e4, 0.0], [-jnp.inf, 0.0, 0.0]])
    np.testing.assert_allclose(categorical.nll(extreme, jnp.array([1, 2])), [2e4, np.log(2)], rtol=1e-6)
    gradient = jax.grad(lambda l: categorical.nll(l, jnp.array([1, 2])).sum())(extreme)
    assert np.isfinite(gradient).all()


def test_cross_entropy_of_a_confident_network_keeps_its_digits():
    loss = categorical.nll(jnp.array([100.0, 86.0, 80.0]), jnp.array(0))
    np.testing.assert_allclose(loss, np.log1p(np.exp(-14.0) + np.exp(-20.0)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_computed_with_in_float32(dtype):
    half = (3 * jax.random.normal(jax.random.key(0), (64, 300))).astype(dtype)
    wide, x = half.astype(jnp.float32), jnp.arange(64)
    draw = jax.jit(categorical.draw_with_log_normaliser)
    keys = token_keys(jax.random.key(1), (64,))
    for got, want in zip(draw(keys, half), draw(keys, wide), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    kept = [np.isfinite(jax.jit(categorical.nucleus)(logits, 0.9)) for logits in (half, wide)]
    np.testing.assert_array_equal(*kept)
    value, pull = jax.vjp(lambda logits: categorical.nll(logits, x, 299), half)
    wanted, wide_pull = jax.vjp(lambda logits: categorical.nll(logits, x, 299), wide)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    (slope,), (wanted,) = pull(jnp.ones(64)), wide_pull(jnp.ones(64))
    assert slope.dtype == dtype
    tiny = float(jnp.finfo(dtype).tiny)  # below which digits go
    np.testing.assert_allclose(np.float32(slope), wanted, rtol=float(jnp.finfo(dtype).eps), atol=tiny)


def test_signal_levels_spread_from_the_left():
    assert per_token(0.5, (2, 3)).shape == (2, 3)
    square = per_token(jnp.array([0.1, 0.2]), (2, 2))  # B = L: one value a sequence, not a position
    np.testing.assert_array_equal(square[:, 0], square[:, 1])
    np.testing.assert_array_equal(per_token(jnp.array([[0.1], [0.2]]), (2, 2)), square)
    with pytest.raises(UserError, match="does not fit"):
        per_token(jnp.zeros(3), (2, 3))


@pytest.mark.parametrize("top_p", [0, -0.5, 1.5])
def test_mistakes_are_told(top_p):
    with pytest.raises(UserError, match="top_p"):
        categorical.nucleus(jnp.zeros(3), top_p)
