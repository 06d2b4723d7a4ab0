"""The duality: Gaussian diffusion on one-hot vectors whose argmax is uniform-state diffusion, and the curricula on it.

*The Diffusion Duality* (arXiv 2506.10892, "I") and its second chapter (arXiv 2602.21185, "II"). The latent is
w_t = a x + s eps with a^2 = sigmoid(-gamma), s^2 = sigmoid(gamma), eps ~ N(0, I_K); only mu = a/s = exp(-gamma/2)
matters to the argmax. Tokens are `[B, L]`; gamma is a scalar, `[B]`, `[B, 1]` or `[B, L]`; gamma and tau may be traced.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.special import log_ndtr

from duo_jax.diffusion.arrays import as_float, check_vocab_size, per_token
from duo_jax.diffusion.order_statistics import distinct_others, top_normals
from duo_jax.diffusion.special import log_mean_exp_below, ndtr
from duo_jax.errors import UserError

# At least so many order statistics enter the softmax's denominator one by one; the sum of the rest is a single draw.
_EXACT_TERMS = 32


def gamma(t: jax.typing.ArrayLike, gamma_min: float, gamma_max: float) -> jax.Array:
    """The Gaussian noise level gamma_t = gamma_min + t (gamma_max - gamma_min), same shape as t."""
    return gamma_min + jnp.asarray(t) * (gamma_max - gamma_min)


def signal_and_noise(gamma: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The latent's scales (a, s) = (sqrt sigmoid(-gamma), sqrt sigmoid(gamma)), each of gamma's shape."""
    gamma = as_float(gamma)
    return jnp.sqrt(jax.nn.sigmoid(-gamma)), jnp.sqrt(jax.nn.sigmoid(gamma))


@functools.lru_cache(maxsize=32)
def _nodes(vocab_size: int) -> tuple[np.ndarray, ...]:
    """Nodes z, log weights and lower tails of the quadrature over M, the largest of K-1 normals (float64)."""
    # The integrands are analytic and vanish at both ends, so the trapezoid rule converges exponentially: halving this step
    # changes no result by more than 1e-13. The upper end covers the derivative's peak near mu/2 as far as float32 reaches.
    step = 1.0 / 16.0
    z = np.arange(-9.0, 18.0, step)
    log_weight = math.log(vocab_size * step / math.sqrt(2.0 * math.pi)) - 0.5 * z**2 + (vocab_size - 2) * log_ndtr(z)
    kept = log_weight > -170.0
    z, log_weight = z[kept], log_weight[kept]
    return z, log_weight, np.exp(log_ndtr(-np.abs(z)))


def alpha(gamma: jax.typing.ArrayLike, vocab_size: int) -> jax.Array:
    """The diffusion transformation operator alpha = T(gamma) (I, eq. 10), same shape as gamma; exact quadrature.

    T = (K P - 1)/(K - 1) with P = E_u[Phi(mu + u)^(K-1)]. Where alpha is small, P is 1/K plus almost nothing, so this
    computes an equal sum of positive terms: with M the largest of K-1 normals, T = K/(K-1) E[Phi(M) - Phi(M - mu)].

    Raises:
        UserError: K below 2.
    """
    check_vocab_size(vocab_size)
    gamma = as_float(gamma)
    z, log_weight, tail = _nodes(vocab_size)
    side = np.where(z > 0, 1.0, -1.0)  # take the difference in the smaller tail
    z, weight, tail, side = (jnp.asarray(v, gamma.dtype) for v in (z, np.exp(log_weight) * side, tail, side))
    mu = jnp.exp(-0.5 * gamma)[..., None]
    return jnp.sum(weight * (ndtr(side * (mu - z)) - tail), axis=-1)


def dalpha(gamma: jax.typing.ArrayLike, vocab_size: int) -> jax.Array:
    """The derivative d T / d gamma < 0, same shape as gamma: -(mu/2) K/(K-1) E[phi(M - mu)], M as in `alpha`.

    The loss needs d alpha / d t, which is this times gamma_max - gamma_min.

    Raises:
        UserError: K below 2.
    """
    check_vocab_size(vocab_size)
    gamma = as_float(gamma)
    z, log_weight, _ = (jnp.asarray(v, gamma.dtype) for v in _nodes(vocab_size))
    mu = jnp.exp(-0.5 * gamma)
    log_density = jax.nn.logsumexp(log_weight - 0.5 * (z - mu[..., None]) ** 2, axis=-1)
    return -0.5 / math.sqrt(2.0 * math.pi) * mu * jnp.exp(log_density)


def gaussian_latent(key: jax.Array, x: jax.Array, gamma: jax.typing.ArrayLike, vocab_size: int) -> jax.Array:
    """Draws w_t = a x + s eps, float32 `[B, L, K]` (I, eq. 7): x int `[B, L]`. Its argmax has alpha_t = T(gamma_t).

    Raises:
        UserError: K below 2, or a gamma of another shape.
    """
    check_vocab_size(vocab_size)
    eps = jax.random.normal(key, (*x.shape, vocab_size), jnp.float32)
    return latent_from_noise(eps, x, gamma)


def latent_from_noise(eps: jax.Array, x: jax.Array, gamma: jax.typing.ArrayLike) -> jax.Array:
    """w_t = a x + s eps for given eps `[B, L, K]`; one eps at two gammas gives a deterministic trajectory.

    Raises:
        UserError: a gamma of another shape.
    """
    signal, noise = signal_and_noise(per_token(gamma, x.shape)[..., None])
    ids = lax.broadcasted_iota(jnp.int32, eps.shape, eps.ndim - 1)
    return noise * eps + jnp.where(ids == x[..., None], signal, 0.0)


def tempered_softmax(w: jax.Array, tau: jax.typing.ArrayLike) -> jax.Array:
    """The relaxed input softmax(w / tau) over the last axis (I, eq. 14): w and result `[B, L, K]`, tau > 0 a scalar."""
    return jax.nn.softmax(w / tau, axis=-1)


def tau(
    step: jax.typing.ArrayLike, start: int, end: int, log10_start: float = -3.0, log10_end: float = -3.0
) -> jax.Array:
    """The curriculum's temperature at a training step, from 10^log10_start at `start` to 10^log10_end at `end`.

    The exponent is constant before `start` and then changes linearly. From `end` on the curriculum is over, and 1e-10
    stands for the limit, where the relaxed input is the one-hot z_t. `step` may be traced; returns float32 of its shape.

    Raises:
        UserError: `end` lies before `start`.
    """
    if end < start:
        raise UserError(f"the curriculum ends (step {end}) before it starts (step {start})")
    step = jnp.asarray(step)
    fraction = jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)
    return jnp.where(step < end, 10.0 ** (log10_start + fraction * (log10_end - log10_start)), 1e-10)


def tempered_topk(
    key: jax.Array, x: jax.Array, gamma: jax.typing.ArrayLike, tau: jax.typing.ArrayLike, k: int, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws the k largest entries of softmax(w_t / tau) without building w_t (II, section 4): the efficient curriculum.

    x int `[B, L]`, gamma as everywhere, tau > 0 a scalar. Returns weights float32 `[B, L, k]` in descending order,
    which sum to less than 1 (the rest of the softmax is omitted); their ids int32 `[B, L, k]`, distinct; and z_t int32
    `[B, L]`, the id of the largest, which is argmax(w_t), so that alpha_t = T(gamma_t).

    Of the K-1 other tokens only the largest few matter, and their ids are a uniform choice. The largest max(k, 32) are
    drawn and enter the denominator one by one; the sum of all below them is drawn from a log-normal with the mean and
    variance of a sum of truncated terms. With K-1 <= max(k, 32) everything is exact.

    Raises:
        UserError: K below 2, k outside 1 .. K, or a gamma of another shape.
    """
    check_vocab_size(vocab_size)
    if not 1 <= k <= vocab_size:
        raise UserError(f"k must lie between 1 and the vocabulary size {vocab_size}, not {k}")
    n_drawn = min(vocab_size - 1, max(k, _EXACT_TERMS))
    signal, noise = signal_and_noise(per_token(gamma, x.shape))
    true_key, others_key, ids_key, rest_key = jax.random.split(key, 4)
    normals = top_normals(others_key, x.shape, vocab_size - 1, n_drawn)
    others = noise[..., None] * normals
    true = signal + noise * jax.random.normal(true_key, x.shape)
    other_ids = distinct_others(ids_key, x, min(k, vocab_size - 1), vocab_size)

    slot = jnp.arange(n_drawn + 1)
    rank = jnp.sum(others > true[..., None], axis=-1, keepdims=True)
    values = jnp.where(slot == rank, true[..., None], _open_slot(others, slot, rank))
    ids = jnp.where(slot[:k] == rank, x[..., None], _open_slot(other_ids, slot[:k], rank)).astype(jnp.int32)

    # Exponents are relative to the largest entry: for small tau, w / tau itself has lost digits of w. The largest entry's
    # exponent is set to 0: a compiler may round the two sides of the difference differently, and 1 / tau magnifies that.
    top = values[..., :1]
    exponents = jnp.where(slot == 0, 0.0, jnp.minimum((values - top) / tau, 0.0))
    terms = [exponents]
    n_rest = vocab_size - 1 - n_drawn
    if n_rest:
        ceiling = jnp.minimum((others[..., -1:] - top) / tau, 0.0)
        terms.append(ceiling + _log_rest(rest_key, normals[..., -1:], noise[..., None] / tau, n_rest))
    log_total = jax.nn.logsumexp(jnp.concatenate(terms, axis=-1), axis=-1, keepdims=True)
    return jnp.exp(exponents[..., :k] - log_total), ids, ids[..., 0]


def n_visible_entries(tau: float, gamma_min: float, vocab_size: int, most: int) -> int | None:
    """Decides whether the `full` curriculum may use `tempered_topk`, and with which k: returns it, or None if it may not.

    It may if float32 cannot see any but the k largest entries of softmax(w_t / tau), for every gamma >= gamma_min. All
    entries that lie further than (tau / s) log(2^24 K) below the largest, s the noise scale, add up to less than 2^-24 of
    it. Returns the smallest m such that more than m entries lie nearer with probability at most 1e-9 per token, or None if
    that m exceeds `most`. `tempered_topk` with k = m then draws the whole softmax.

    Given M, the largest of the K-1 others, the number of others within d below it is binomial with p = 1 - Phi(M-d) /
    Phi(M). Chernoff's bound on its tail is averaged over M.

    Raises:
        UserError: K below 2.
    """
    check_vocab_size(vocab_size)
    if most < 1:
        return None
    noise = math.sqrt(1.0 / (1.0 + math.exp(-gamma_min)))
    near = tau / noise * math.log(2.0**24 * vocab_size)
    z, log_weight, _ = _nodes(vocab_size)
    mean = -(vocab_size - 2) * np.expm1(log_ndtr(z - near) - log_ndtr(z))
    rest = np.arange(1, min(most, vocab_size) + 1)[:, None]
    ratio = np.maximum(rest, mean) / np.maximum(mean, 1e-300)
    tail = np.exp(np.maximum(rest, mean) - mean - np.maximum(rest, mean) * np.log(ratio))
    rare = np.sum(np.exp(log_weight) * tail, axis=-1) <= 1e-9
    m = min(int(np.argmax(rare)) + 1 + 2, vocab_size)  # the largest itself and the true token beside them
    return m if rare.any() and m <= most else None


def _open_slot(sorted_others: jax.Array, slot: jax.Array, rank: jax.Array) -> jax.Array:
    """Moves the others `[..., m]` into slots `[k]`, leaving the slot `rank [..., 1]` for another entry: `[..., k]`."""
    source = jnp.clip(slot - (slot > rank), 0, sorted_others.shape[-1] - 1)
    return jnp.take_along_axis(sorted_others, source, axis=-1)


def _log_rest(key: jax.Array, a: jax.Array, scale: jax.Array, n: int) -> jax.Array:
    """Draws log of the sum of `n` terms exp(v - c), v ~ N(0, scale^2) given v < c = a scale, all `[...]`, by two moments."""
    log_mean, log_second = log_mean_exp_below(a, scale), log_mean_exp_below(a, 2.0 * scale)
    # log(1 + variance / mean^2) of the sum of n independent terms.
    spread = jnp.log1p(jnp.maximum(jnp.expm1(log_second - 2.0 * log_mean), 0.0) / n)
    return math.log(n) + log_mean - 0.5 * spread + jnp.sqrt(spread) * jax.random.normal(key, a.shape)
