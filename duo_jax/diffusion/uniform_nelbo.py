"""The Rao-Blackwellised NELBO of uniform-state diffusion (*The Diffusion Duality*, arXiv 2506.10892, f_Duo).

Definitions. For one token let i = z_t, c = K alpha / (1 - alpha), p the network's prediction, and for every token j

    s_j     = c p_j                                       so that pbar_j is proportional to 1 + s_j
    r_j     = xbar_j / xbar_i                             true rate ratio; xbar_j is proportional to 1 + c [j = x]
    r_hat_j = pbar_j / pbar_i = (1 + s_j) / (1 + s_i)     predicted rate ratio
    y_j     = r_hat_j / r_j,    d_j = y_j - 1

The published integrand is f = w F with w = -alpha' / (K alpha) and a sum of non-negative terms,

    F = sum_{j != i} r_j (d_j - log(1 + d_j)).

In this form nothing of order K or 1/alpha cancels: float32 keeps a relative accuracy of about 1e-6. The d_j are computed
without a difference of large numbers, from s_not_x = sum_{j != x} s_j = c (1 - p_x):

* z_t = x: every j != i has r_j = 1 / (1 + c) and d_j = ((1 + c) s_j + s_shift) / (1 + s_i), s_shift = c - s_i = s_not_x.
* z_t != x: every j other than i and x has r_j = 1 and d_j = (s_j + s_shift) / (1 + s_i), s_shift = -s_i; and
  r_x = 1 + c, d_x = -(s_not_x + s_i + s_i c) / ((1 + s_i) (1 + c)).

In both cases, sum_r_diff = sum_{j != i} (r_hat_j - r_j) = K / (1 - alpha) s_shift / ((1 + s_i) (1 + c [i = x])).

Gradient. dF/ds_j = (r_hat_j - r_j) / (1 + s_j) for j != i, and dF/ds_i = -sum_r_diff / (1 + s_i). Let g_j = s_j dF/ds_j.
At fixed p and r, dF/dc = sum_j g_j / c; the derivative of the softmax then gives dF/dlogit_j = g_j - s_j dF/dc.
alpha enters f through w and c, and c enters F through r as well: dF/dr_j = -log y_j.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from duo_jax.diffusion.arrays import (
    as_float,
    before_sum,
    check_vocab_size,
    is_entry,
    per_token,
    recompute_after,
    take,
    top_and_sum,
)
from duo_jax.diffusion.special import excess
from duo_jax.errors import UserError

# Below the smallest non-zero 1 - alpha of float32: alpha = 1 then costs a large finite loss, not an infinite one.
_MIN_NOISE = 1e-8
_MIN_SIGNAL = 1e-12


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
    """As `nelbo`, from unnormalised logits `[..., K]`, z_t and x int `[...]`, and levels that broadcast to `[...]`.

    A CPU keeps the exponentials: one temporary of the vocabulary's size beside the logits and their gradient. Elsewhere
    each pass over the logits recomputes them.

    Raises:
        UserError: the shapes do not agree, or K is below 2.
    """
    if not z_t.shape == x.shape == logits.shape[:-1]:
        raise UserError(f"logits {logits.shape}, z_t {z_t.shape} and x {x.shape} do not describe the same tokens")
    check_vocab_size(logits.shape[-1])
    return _nelbo(logits, z_t, x, as_float(per_token(alpha, x.shape)), as_float(per_token(dalpha, x.shape)))


class _Terms(NamedTuple):
    """Factors that the terms of F share, each `[...]`. "The others" are the tokens j other than i = z_t and x."""

    c: jax.Array  # K alpha / (1-alpha)
    s_scale: jax.Array  # s_j = s_scale e_j, e_j as in `_others`
    y_scale: jax.Array  # for the others, y_j = y_scale (1 + s_j) and
    d_shift: jax.Array  # d_j = y_scale s_j + d_shift
    r: jax.Array  # r_j of the others
    s_i: jax.Array
    s_x: jax.Array
    sum_r_diff: jax.Array  # sum over j != i of (r_hat_j - r_j)
    d_x: jax.Array  # 0 where x = i
    log_y_x: jax.Array  # 0 where x = i


def _others(logits: jax.Array, z_t: jax.Array, x: jax.Array, top: jax.Array) -> jax.Array:
    """e_j = exp(logit_j - top) of the tokens j other than z_t and x, `[..., K]`; 0 at these two."""
    return jnp.where(is_entry(z_t, logits) | is_entry(x, logits), 0.0, jnp.exp(logits - top[..., None]))


def _terms(logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array) -> tuple[_Terms, jax.Array]:
    """The terms, and the largest logit, from which an accelerator recomputes `_others`."""
    same = z_t == x
    signal, noise = jnp.maximum(alpha, _MIN_SIGNAL), jnp.maximum(1.0 - alpha, _MIN_NOISE)
    k_over_noise = logits.shape[-1] / noise
    c = k_over_noise * signal
    top, sum_e_others = top_and_sum(logits, ~(is_entry(z_t, logits) | is_entry(x, logits)))
    e_i, e_x = jnp.exp(take(logits, z_t) - top), jnp.exp(take(logits, x) - top)
    sum_e = sum_e_others + e_i + jnp.where(same, 0.0, e_x)
    # From the other tokens' mass: as c (1 - exp(log p_x)) it would vanish for a confident network.
    s_not_x = c * (sum_e_others + jnp.where(same, 0.0, e_i)) / sum_e
    s_i, s_x = c * e_i / sum_e, c * e_x / sum_e
    s_shift = jnp.where(same, s_not_x, -s_i)
    d_x = -(s_not_x + s_i + s_i * c) / ((1.0 + s_i) * (1.0 + c))
    terms = _Terms(
        c=c,
        s_scale=c / sum_e,
        y_scale=jnp.where(same, 1.0 + c, 1.0) / (1.0 + s_i),
        d_shift=s_shift / (1.0 + s_i),
        r=jnp.where(same, 1.0 / (1.0 + c), 1.0),
        s_i=s_i,
        s_x=s_x,
        sum_r_diff=k_over_noise * s_shift / ((1.0 + s_i) * jnp.where(same, 1.0 + c, 1.0)),
        d_x=jnp.where(same, 0.0, d_x),
        log_y_x=jnp.where(same, 0.0, _log_y(d_x, s_x, -jnp.log1p(s_i) - jnp.log1p(c))),
    )
    return terms, recompute_after(top, sum_e_others)


def _log_y(
    d: jax.Array, s: jax.Array, log_y_scale: jax.Array, log1p: Callable[[jax.Array], jax.Array] = jnp.log1p
) -> jax.Array:
    """log y = log(1 + d), or log(1 + s) + log_y_scale where d is near -1; that sum would cancel elsewhere."""
    use_d = d > -0.9
    return log1p(jnp.where(use_d, d, s)) + jnp.where(use_d, 0.0, log_y_scale)


def _s_and_d(e_others: jax.Array, terms: _Terms) -> tuple[jax.Array, jax.Array]:
    """s_j and d_j of the tokens other than z_t and x, `[..., K]`."""
    s = terms.s_scale[..., None] * e_others
    return s, terms.y_scale[..., None] * s + terms.d_shift[..., None]


@jax.custom_vjp
def _nelbo(logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array, dalpha: jax.Array) -> jax.Array:
    return _nelbo_forward(logits, z_t, x, alpha, dalpha)[0]


def _nelbo_forward(
    logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array, dalpha: jax.Array
) -> tuple[jax.Array, tuple]:
    values = as_float(logits)
    terms, top = _terms(values, z_t, x, alpha)
    s, d = _s_and_d(_others(values, z_t, x, top), terms)
    # log y_scale where z_t != x. Where z_t = x, all d_j >= 0 and `_log_y` does not use it.
    log_y_scale = -jnp.log1p(terms.s_i)[..., None]
    # log1p would cost twice as much, for digits that matter only near d = 0, where `excess` does not use the logarithm.
    gaps = excess(d, _log_y(d, s, log_y_scale, lambda v: jnp.log(1.0 + v)))
    sum_gaps = jnp.sum(jnp.where(is_entry(z_t, values) | is_entry(x, values), 0.0, gaps), axis=-1)
    f_over_w = terms.r * sum_gaps + (1.0 + terms.c) * excess(terms.d_x, terms.log_y_x)
    w = -dalpha / (values.shape[-1] * jnp.maximum(alpha, _MIN_SIGNAL))
    return w * f_over_w, (logits, z_t, x, alpha, dalpha, terms, sum_gaps, f_over_w, top)


def _nelbo_backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, None, None, jax.Array, jax.Array]:
    """The gradient in closed form, exact in every argument; see the module. Here grad_* are derivatives of F or f."""
    logits, z_t, x, alpha, dalpha, terms, sum_gaps, f_over_w, top = residuals
    values, vocab_size = as_float(logits), logits.shape[-1]
    same = z_t == x
    signal, noise = jnp.maximum(alpha, _MIN_SIGNAL), jnp.maximum(1.0 - alpha, _MIN_NOISE)
    w = -dalpha / (vocab_size * signal)

    s, d = _s_and_d(_others(values, z_t, x, top), terms)
    sum_g_over_r = jnp.sum(before_sum(d * (s / (1.0 + s))), axis=-1)  # of the others
    s, d = _s_and_d(_others(values, z_t, x, recompute_after(top, sum_g_over_r)), terms)
    g_i = -terms.sum_r_diff * (terms.s_i / (1.0 + terms.s_i))
    g_x = (1.0 + terms.c) * terms.d_x * (terms.s_x / (1.0 + terms.s_x))
    sum_g = terms.r * sum_g_over_r + g_x + g_i
    cotangent_of_f = cotangent * w
    grad_c = sum_g / terms.c  # dF/dc at fixed p and r
    grad_logits = terms.r[..., None] * d * (s / (1.0 + s)) - s * grad_c[..., None]
    grad_logits = jnp.where(is_entry(x, values), (g_x - terms.s_x * grad_c)[..., None], grad_logits)
    grad_logits = jnp.where(is_entry(z_t, values), (g_i - terms.s_i * grad_c)[..., None], grad_logits)
    grad_logits = cotangent_of_f[..., None] * grad_logits

    # dF/dc through r: where z_t = x, every r_j is 1 / (1 + c); elsewhere only r_x = 1 + c depends on c.
    sum_log_y = terms.sum_r_diff / terms.r - sum_gaps  # right where z_t = x
    grad_c_through_r = jnp.where(same, terms.r**2 * sum_log_y, -terms.log_y_x)
    grad_alpha = w * (vocab_size / noise**2 * (grad_c + grad_c_through_r) - f_over_w / signal)
    grad_dalpha = -f_over_w / (vocab_size * signal)
    return grad_logits.astype(logits.dtype), None, None, cotangent * grad_alpha, cotangent * grad_dalpha


_nelbo.defvjp(_nelbo_forward, _nelbo_backward)
