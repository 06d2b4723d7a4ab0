"""Uniform-state diffusion: forward process, posterior, mixture step and the Rao-Blackwellised NELBO.

*The Diffusion Duality* (arXiv 2506.10892, "I"). Shapes: tokens `[B, L]`, logits and probabilities `[B, L, K]`. A signal
level alpha is a scalar, `[B]`, `[B, 1]` or `[B, L]` (see `arrays.per_token`), and any other shape raises UserError.
What visits the vocabulary takes any leading shape `[...]`, so that a caller may walk through the tokens in chunks. Losses
are in nats.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from duo_jax.diffusion import categorical
from duo_jax.diffusion.arrays import (
    as_float,
    check_vocab_size,
    is_entry,
    map_keys,
    per_token,
    recompute_after,
    take,
    token_keys,
    top_and_sum,
)
from duo_jax.diffusion.special import excess
from duo_jax.errors import UserError

# Below the smallest non-zero 1 - alpha of float32: alpha = 1 then costs a large finite loss, not an infinite one.
_MIN_NOISE = 1e-8
_MIN_SIGNAL = 1e-12


def q_sample(key: jax.Array, x: jax.Array, alpha_t: jax.typing.ArrayLike, vocab_size: int) -> jax.Array:
    """Draws z_t ~ Cat(alpha_t x + (1-alpha_t)/K 1) (I, eq. 2): x int `[B, L]`, to int32 `[B, L]`.

    Raises:
        UserError: K below 2, or an alpha_t of another shape.
    """
    check_vocab_size(vocab_size)
    move_key, token_key = jax.random.split(key)
    moves = jax.random.uniform(move_key, x.shape) < 1.0 - per_token(alpha_t, x.shape)
    return jnp.where(moves, prior_sample(token_key, x.shape, vocab_size), x).astype(jnp.int32)


def prior_sample(key: jax.Array, shape: tuple[int, ...], vocab_size: int) -> jax.Array:
    """Draws z_1 from the prior, uniform over K: int32 of the given shape."""
    return jax.random.randint(key, shape, 0, vocab_size, jnp.int32)


def posterior(p: jax.Array, z_t: jax.Array, alpha_s: jax.typing.ArrayLike, alpha_t: jax.typing.ArrayLike) -> jax.Array:
    """q(z_s | z_t, x = p) as a dense table `[B, L, K]` (I, eq. 3): p `[B, L, K]`, z_t int `[B, L]`, alpha_s >= alpha_t.

    The definition, kept for tests and for guidance, which needs the whole table; samplers use `mixture_step`.
    """
    vocab_size = p.shape[-1]
    alpha_s, alpha_t = (per_token(alpha, z_t.shape)[..., None] for alpha in (alpha_s, alpha_t))
    jump = (alpha_s - alpha_t) / alpha_s
    # Both factors carry a K, so that nothing is of order 1/K^2.
    transition = vocab_size * (1.0 - jump) * jax.nn.one_hot(z_t, vocab_size, dtype=p.dtype) + jump
    marginal_s = vocab_size * alpha_s * p + (1.0 - alpha_s)
    marginal_t = vocab_size * alpha_t * take(p, z_t)[..., None] + (1.0 - alpha_t)
    return transition * marginal_s / (vocab_size * marginal_t)


def _jump(alpha_s: jax.Array, alpha_t: jax.Array) -> jax.Array:
    """1 - alpha_t / alpha_s as a quotient of the difference: the ratio would round it away when the step is short."""
    return jnp.where(alpha_s > alpha_t, (alpha_s - alpha_t) / alpha_s, 0.0)


def _branch(keys: jax.Array, *weights: jax.Array) -> jax.Array:
    """Draws which of some weights `[...]`, by its index int32 `[...]`; the first where all are 0."""
    # mode="high" keeps branches far rarer than float32's uniform grid of 1e-7 at their own rate.
    noise = map_keys(lambda key: jax.random.gumbel(key, (len(weights),), mode="high"), keys)
    return jnp.argmax(jnp.log(jnp.stack(weights, axis=-1)) + noise, axis=-1)


def _uniform(keys: jax.Array, vocab_size: int) -> jax.Array:
    return map_keys(lambda key: prior_sample(key, (), vocab_size), keys)


def _split(keys: jax.Array) -> tuple[jax.Array, ...]:
    """Four keys of each: whether p is asked for, what of the three happens then, the token drawn from p, a uniform one."""
    four = map_keys(lambda key: jax.random.split(key, 4), keys)
    return tuple(four[..., i] for i in range(4))


def ask(
    keys: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Which tokens' `mixture_step` depends on p at all, bool `[...]`, and what the others become, int32 `[...]`.

    The posterior stays with probability at least kappa a (1-alpha_s) / (1-alpha_t), the least being that of p_i = 0, and
    draws a uniform token with at least (1-kappa) (1-alpha_s), whatever p is. Drawn first, these two spare a sampler
    the predictions at such tokens: of n steps about 2 log n ask at each token. The arguments are those of `mixture_step`.
    """
    alpha_s, alpha_t, kappa = (per_token(value, z_t.shape) for value in (alpha_s, alpha_t, kappa))
    which, _, _, other = _split(keys)
    jump = _jump(alpha_s, alpha_t)
    stay = kappa * (1.0 - jump) * (1.0 - alpha_s)
    anew = (1.0 - kappa) * (1.0 - alpha_s) * (1.0 - alpha_t)
    asked = kappa * jump + (1.0 - kappa) * alpha_s * (1.0 - alpha_t)  # the rest of 1 - alpha_t
    branch = _branch(which, stay, anew, asked)
    return branch == 2, jnp.where(branch == 1, _uniform(other, vocab_size), z_t).astype(jnp.int32)


def answer(
    keys: jax.Array,
    logits: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """What the tokens that `ask` become, given their logits `[..., K]`, int32 `[...]`; see `mixture_step`."""
    vocab_size = logits.shape[-1]
    alpha_s, alpha_t, kappa = (per_token(value, z_t.shape) for value in (alpha_s, alpha_t, kappa))
    _, which, token, other = _split(keys)
    drawn, log_normaliser = categorical.draw_with_log_normaliser(token, logits)
    signal = vocab_size * alpha_t * jnp.exp(as_float(take(logits, z_t)) - log_normaliser)
    jump, noise = _jump(alpha_s, alpha_t), 1.0 - alpha_t
    branch = _branch(
        which,
        signal * (kappa * jump + (1.0 - kappa) * alpha_s * noise),
        noise * alpha_s * (kappa * jump + (1.0 - kappa) * noise),
        noise * (1.0 - alpha_s) * kappa * jump,
    )
    return jnp.select([branch == 0, branch == 1], [z_t, drawn], _uniform(other, vocab_size)).astype(jnp.int32)


def mixture_step(
    keys: jax.Array,
    logits: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Draws z_s given z_t, with p = softmax(logits) in place of x, as a three-way mixture: no table, one draw.

    keys `[...]` (one a token), logits `[..., K]`, z_t int `[...]`, alpha_s >= alpha_t, returns int32 `[...]`.

    The posterior (I, eq. 3) stays at i = z_t with weight K alpha_t p_i + a (1-alpha_s), where a = alpha_t / alpha_s,
    draws from p with weight (1-a) alpha_s, and draws a uniform token with weight (1-a) (1-alpha_s). `kappa` < 1 gives
    the Psi step (arXiv 2602.21185), kappa q(z_s | z_t) + (1-kappa) [alpha_s q(z_0 | z_t) + (1-alpha_s)/K], which mixes
    the same three. What of the weights does not depend on p is drawn first, by `ask`, and the rest by `answer`.
    """
    asks, z_s = ask(keys, z_t, alpha_s, alpha_t, kappa, logits.shape[-1])
    return jnp.where(asks, answer(keys, logits, z_t, alpha_s, alpha_t, kappa), z_s)


def step(
    key: jax.Array,
    log_p: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
) -> jax.Array:
    """Draws z_s ~ q(z_s | z_t, x = exp(log_p)) (I, eq. 3): log_p `[B, L, K]`, z_t int `[B, L]`, to int32 `[B, L]`."""
    return mixture_step(token_keys(key, z_t.shape), log_p, z_t, alpha_s, alpha_t)


def nelbo(
    log_p: jax.Array,
    z_t: jax.Array,
    x: jax.Array,
    alpha_t: jax.typing.ArrayLike,
    dalpha_t: jax.typing.ArrayLike,
) -> jax.Array:
    """The bound's integrand f (I, eq. for f_Duo), nats per token `[B, L]`: log_p `[B, L, K]`, z_t and x int `[B, L]`.

    Its mean over t ~ U[0, 1] and z_t ~ q(z_t | x) bounds the negative log-likelihood. dalpha_t is d alpha / d t < 0.

    Raises:
        UserError: see `nelbo_from_logits`.
    """
    return nelbo_from_logits(log_p, z_t, x, alpha_t, dalpha_t)


def nelbo_from_logits(
    logits: jax.Array,
    z_t: jax.Array,
    x: jax.Array,
    alpha: jax.typing.ArrayLike,
    dalpha: jax.typing.ArrayLike,
) -> jax.Array:
    """As `nelbo`, from unnormalised logits `[..., K]` of any leading shape; everything else `[...]` or wider.

    With i = z_t, true rate ratios r_j = xbar_j / xbar_i and predicted r_hat_j = pbar_j / pbar_i, the published f is

        f = -alpha' / (K alpha) * sum_{j != i} r_j (y_j - 1 - log y_j),    y_j = r_hat_j / r_j,

    a sum of non-negative terms. In this order nothing of order K or 1/alpha cancels: float32 keeps about 1e-6 relative.
    On a CPU the exponentials are kept: beside logits and gradient, one temporary of the vocabulary's size. Elsewhere each
    pass over the logits takes them anew.

    Raises:
        UserError: the shapes do not agree, or K is below 2.
    """
    if not z_t.shape == x.shape == logits.shape[:-1]:
        raise UserError(f"logits {logits.shape}, z_t {z_t.shape} and x {x.shape} do not describe the same tokens")
    check_vocab_size(logits.shape[-1])
    return _nelbo(logits, z_t, x, as_float(per_token(alpha, x.shape)), as_float(per_token(dalpha, x.shape)))


class _Terms(NamedTuple):
    """What the terms of one token share, each `[...]`; s_j = (K alpha / (1-alpha)) p_j, so that pbar_j ~ 1 + s_j."""

    clean: jax.Array  # s_j of a one-hot: K alpha / (1-alpha)
    scale: jax.Array  # s_j = scale e_j
    gain: jax.Array  # y_j = gain (1 + s_j) for the tokens j other than i and x
    gain_minus_1: jax.Array
    rate: jax.Array  # r_j of those tokens
    s_i: jax.Array
    s_x: jax.Array
    drift: jax.Array  # sum over j != i of (r_hat_j - r_j)
    d_x: jax.Array  # y_x - 1, where x is not i
    log_y_x: jax.Array


def _others(logits: jax.Array, z_t: jax.Array, x: jax.Array, top: jax.Array) -> jax.Array:
    """e_j = exp(logit_j - top) of the tokens j other than z_t and x, `[..., K]`; 0 at these two."""
    return jnp.where(is_entry(z_t, logits) | is_entry(x, logits), 0.0, jnp.exp(logits - top[..., None]))


def _terms(logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array) -> tuple[_Terms, jax.Array]:
    """Also the largest logit, such that `_others` is computed anew."""
    same = z_t == x
    signal, noise = jnp.maximum(alpha, _MIN_SIGNAL), jnp.maximum(1.0 - alpha, _MIN_NOISE)
    per_noise = logits.shape[-1] / noise
    clean = per_noise * signal
    top, rest = top_and_sum(logits, ~(is_entry(z_t, logits) | is_entry(x, logits)))
    e_i, e_x = jnp.exp(take(logits, z_t) - top), jnp.exp(take(logits, x) - top)
    total = rest + e_i + jnp.where(same, 0.0, e_x)
    # 1 - p_x from the other tokens' mass: 1 - exp(log p_x) would lose it for a confident network.
    missing = clean * (rest + jnp.where(same, 0.0, e_i)) / total
    s_i, s_x = clean * e_i / total, clean * e_x / total
    away = jnp.where(same, missing, -s_i)
    d_x = -(missing + s_i + s_i * clean) / ((1.0 + s_i) * (1.0 + clean))
    terms = _Terms(
        clean=clean,
        scale=clean / total,
        gain=jnp.where(same, 1.0 + clean, 1.0) / (1.0 + s_i),
        gain_minus_1=away / (1.0 + s_i),
        rate=jnp.where(same, 1.0 / (1.0 + clean), 1.0),
        s_i=s_i,
        s_x=s_x,
        drift=per_noise * away / ((1.0 + s_i) * jnp.where(same, 1.0 + clean, 1.0)),
        d_x=jnp.where(same, 0.0, d_x),
        log_y_x=jnp.where(same, 0.0, _log_ratio(d_x, s_x, -jnp.log1p(s_i) - jnp.log1p(clean))),
    )
    return terms, recompute_after(top, rest)


def _log_ratio(
    d: jax.Array, s: jax.Array, log_gain: jax.Array, log1p: Callable[[jax.Array], jax.Array] = jnp.log1p
) -> jax.Array:
    """log(1+d), 1+d = (1+s) exp(log_gain): from d unless that rounds to -1, since the two logarithms may cancel."""
    direct = d > -0.9
    return log1p(jnp.where(direct, d, s)) + jnp.where(direct, 0.0, log_gain)


def _s_and_d(others: jax.Array, terms: _Terms) -> tuple[jax.Array, jax.Array]:
    """s_j and y_j - 1 of the tokens other than z_t and x, `[..., K]`."""
    s = terms.scale[..., None] * others
    return s, terms.gain[..., None] * s + terms.gain_minus_1[..., None]


@jax.custom_vjp
def _nelbo(logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array, dalpha: jax.Array) -> jax.Array:
    return _nelbo_forward(logits, z_t, x, alpha, dalpha)[0]


def _nelbo_forward(
    logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array, dalpha: jax.Array
) -> tuple[jax.Array, tuple]:
    values = as_float(logits)
    terms, top = _terms(values, z_t, x, alpha)
    s, d = _s_and_d(_others(values, z_t, x, top), terms)
    # Where z_t = x the gain is at least 1 and so is every y, and this is not looked at.
    log_gain = -jnp.log1p(terms.s_i)[..., None]
    # log1p would cost twice as much, for digits that matter only near d = 0, where this is not looked at either.
    gaps = excess(d, _log_ratio(d, s, log_gain, lambda v: jnp.log(1.0 + v)))
    gaps = jnp.sum(jnp.where(is_entry(z_t, values) | is_entry(x, values), 0.0, gaps), axis=-1)
    bound = terms.rate * gaps + (1.0 + terms.clean) * excess(terms.d_x, terms.log_y_x)
    scale = -dalpha / (values.shape[-1] * jnp.maximum(alpha, _MIN_SIGNAL))
    return scale * bound, (logits, z_t, x, alpha, dalpha, terms, gaps, bound, top)


def _nelbo_backward(residuals: tuple, cotangent: jax.Array) -> tuple:
    """The gradient in closed form, from dF/ds_j = (r_hat_j - r_j) / (1 + s_j) for j != i; exact in every argument."""
    logits, z_t, x, alpha, dalpha, terms, gaps, bound, top = residuals
    values, vocab_size = as_float(logits), logits.shape[-1]
    same = z_t == x
    signal, noise = jnp.maximum(alpha, _MIN_SIGNAL), jnp.maximum(1.0 - alpha, _MIN_NOISE)
    scale = -dalpha / (vocab_size * signal)

    # s_j dF/ds_j at i, at x and at the others; then through the softmax.
    s, d = _s_and_d(_others(values, z_t, x, top), terms)
    pull = jnp.sum(d * (s / (1.0 + s)), axis=-1)
    s, d = _s_and_d(_others(values, z_t, x, recompute_after(top, pull)), terms)
    at_i = -terms.drift * (terms.s_i / (1.0 + terms.s_i))
    at_x = (1.0 + terms.clean) * terms.d_x * (terms.s_x / (1.0 + terms.s_x))
    total = terms.rate * pull + at_x + at_i
    weight = cotangent * scale
    share = total / terms.clean
    d_logits = terms.rate[..., None] * d * (s / (1.0 + s)) - s * share[..., None]
    d_logits = jnp.where(is_entry(x, values), (at_x - terms.s_x * share)[..., None], d_logits)
    d_logits = jnp.where(is_entry(z_t, values), (at_i - terms.s_i * share)[..., None], d_logits)
    d_logits = weight[..., None] * d_logits

    # alpha enters through the scale and through s: by the prediction (total / clean) and by the true ratios r_j.
    sum_log_y = terms.drift / terms.rate - gaps
    by_truth = jnp.where(same, terms.rate**2 * sum_log_y, -terms.log_y_x)
    d_alpha = scale * (vocab_size / noise**2 * (share + by_truth) - bound / signal)
    d_dalpha = -bound / (vocab_size * signal)
    return d_logits.astype(logits.dtype), None, None, cotangent * d_alpha, cotangent * d_dalpha


_nelbo.defvjp(_nelbo_forward, _nelbo_backward)
