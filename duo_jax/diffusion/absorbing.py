"""Absorbing-state baselines: the masking process and the bounds of MDLM, SEDD and D3PM; and the autoregressive loss.

MDLM (arXiv 2406.07524), SEDD (arXiv 2310.16834), D3PM (arXiv 2107.03006). Tokens `[B, L]`, logits `[B, L, K]`; a signal
level alpha is a scalar, `[B]`, `[B, 1]` or `[B, L]`, and any other shape raises UserError. As in `uniform`, functions that
read the vocabulary take any leading shape `[...]`. A masked token has the id `mask_id`, one of the K. Losses are in nats
per token.
"""

import math

import jax
import jax.numpy as jnp

from duo_jax.diffusion import categorical
from duo_jax.diffusion.arrays import as_float, is_entry, map_keys, per_token, take
from duo_jax.diffusion.categorical import IMPOSSIBLE, nll, without
from duo_jax.diffusion.special import excess
from duo_jax.errors import UserError

_MIN_NOISE = 1e-8

# A larger log-score overflows float32, in its exponential or in the gradient of it.
_MAX_LOG_SCORE = 60.0


def q_sample(key: jax.Array, x: jax.Array, alpha_t: jax.typing.ArrayLike, mask_id: int) -> jax.Array:
    """Draws z_t ~ Cat(alpha_t x + (1-alpha_t) mask) (MDLM, eq. 1): x int `[B, L]`, to int32 `[B, L]`."""
    masked = jax.random.uniform(key, x.shape) < 1.0 - per_token(alpha_t, x.shape)
    return jnp.where(masked, mask_id, x).astype(jnp.int32)


def posterior(
    p: jax.Array, z_t: jax.Array, alpha_s: jax.typing.ArrayLike, alpha_t: jax.typing.ArrayLike, mask_id: int
) -> jax.Array:
    """q(z_s | z_t, x = p) as a dense table (MDLM, eq. 6): p `[B, L, K]` without mass on the mask, to `[B, L, K]`."""
    vocab_size = p.shape[-1]
    reveal = _reveal_rate(per_token(alpha_s, z_t.shape), per_token(alpha_t, z_t.shape))[..., None]
    masked = reveal * p + (1.0 - reveal) * jax.nn.one_hot(mask_id, vocab_size, dtype=p.dtype)
    return jnp.where((z_t == mask_id)[..., None], masked, jax.nn.one_hot(z_t, vocab_size, dtype=p.dtype))


def _reveal_rate(alpha_s: jax.Array, alpha_t: jax.Array) -> jax.Array:
    """The probability that a masked token is revealed between t and s: (alpha_s - alpha_t) / (1 - alpha_t)."""
    return (alpha_s - alpha_t) / jnp.maximum(1.0 - alpha_t, _MIN_NOISE)


def draw_without_prediction(
    keys: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    mask_id: int,
    kappa: jax.typing.ArrayLike = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Draws which tokens `mixture_step` reveals, bool `[...]`, and z_s of all other tokens, int32 `[...]`.

    Whether a token is revealed does not depend on the prediction, so only revealed tokens need one: for these, call
    `draw_with_prediction` with the same keys. The arguments are those of `mixture_step`.
    """
    alpha_s, alpha_t, kappa = (per_token(value, z_t.shape) for value in (alpha_s, alpha_t, kappa))
    reveal = kappa * _reveal_rate(alpha_s, alpha_t) + (1.0 - kappa) * alpha_s
    hide = (1.0 - kappa) * (1.0 - alpha_s)
    u = map_keys(lambda key: jax.random.uniform(jax.random.split(key)[0]), keys)
    masked = z_t == mask_id
    needs_prediction = masked & (u < reveal)
    return needs_prediction, jnp.where(u < hide, mask_id, z_t).astype(jnp.int32)


def draw_with_prediction(keys: jax.Array, logits: jax.Array, mask_id: int) -> jax.Array:
    """Draws z_s int32 `[...]` from logits `[..., K]`, for the tokens that `draw_without_prediction` reveals."""
    draw_keys = map_keys(lambda key: jax.random.split(key)[1], keys)
    return categorical.draw(draw_keys, without(as_float(logits), mask_id))


def mixture_step(
    keys: jax.Array,
    logits: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    mask_id: int,
    kappa: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Draws z_s given z_t with SUBS: reveals a masked token at rate (alpha_s - alpha_t)/(1 - alpha_t) (MDLM, eq. 6).

    keys `[...]` (one per token), logits `[..., K]`, z_t `[...]`, levels that broadcast to it; returns int32 `[...]`.
    `kappa` < 1 gives the Psi step (arXiv 2602.21185), kappa q(z_s | z_t) + (1-kappa) [alpha_s q(z_0 | z_t) +
    (1-alpha_s) mask], which also masks revealed tokens again. `draw_without_prediction` draws which tokens are revealed,
    `draw_with_prediction` what they become.
    """
    needs_prediction, z_s = draw_without_prediction(keys, z_t, alpha_s, alpha_t, mask_id, kappa)
    return jnp.where(needs_prediction, draw_with_prediction(keys, logits, mask_id), z_s)


def subs(logits: jax.Array, z_t: jax.Array, mask_id: int) -> jax.Array:
    """MDLM's parametrisation (section 3.2.3) as log-probabilities: logits `[..., K]`, z_t int `[...]`, to `[..., K]`.

    A masked token never predicts the mask, a revealed one copies itself. log 0 is -1e6, which never turns into a NaN.
    """
    log_p = jax.nn.log_softmax(without(as_float(logits), mask_id), axis=-1)
    copy = jnp.where(jax.nn.one_hot(z_t, logits.shape[-1], dtype=jnp.bool_), 0.0, IMPOSSIBLE)
    return jnp.where((z_t == mask_id)[..., None], log_p, copy)


def mdlm_nelbo(
    log_p: jax.Array, x: jax.Array, alpha_t: jax.typing.ArrayLike, dalpha_t: jax.typing.ArrayLike
) -> jax.Array:
    """alpha'_t / (1 - alpha_t) log p_x >= 0, `[B, L]` (MDLM, eq. 10): log_p `[B, L, K]` from `subs`, x int `[B, L]`."""
    return _mdlm_weight(x, alpha_t, dalpha_t) * -take(log_p, x)


def mdlm_nelbo_from_logits(
    logits: jax.Array,
    z_t: jax.Array,
    x: jax.Array,
    alpha: jax.typing.ArrayLike,
    dalpha: jax.typing.ArrayLike,
    mask_id: int,
) -> jax.Array:
    """As `mdlm_nelbo` of `subs`, from logits `[..., K]` and without a table of log-probabilities; z_t, x int `[...]`."""
    loss = _mdlm_weight(x, alpha, dalpha) * nll(logits, x, mask_id)
    return jnp.where(z_t == mask_id, loss, 0.0)


def _mdlm_weight(x: jax.Array, alpha: jax.typing.ArrayLike, dalpha: jax.typing.ArrayLike) -> jax.Array:
    alpha, dalpha = (as_float(per_token(value, x.shape)) for value in (alpha, dalpha))
    return -dalpha / jnp.maximum(1.0 - alpha, _MIN_NOISE)


def sedd_log_score(logits: jax.Array, z_t: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
    """SEDD's log-score from the network's output: logits `[..., K]`, z_t int `[...]`, to `[..., K]` (SEDD, app. C.2).

    The network's output is multiplied by 1 / (expm1(sigma) (K-1)), the mean score; the log-score of the input token is 0.
    With alpha = e^-sigma, expm1(sigma) = (1-alpha)/alpha.
    """
    vocab_size = logits.shape[-1]
    alpha = as_float(per_token(alpha, z_t.shape))
    offset = _log_expm1_sigma(alpha) + math.log(vocab_size - 1)
    own = jax.nn.one_hot(z_t, vocab_size, dtype=jnp.bool_)
    return jnp.where(own, 0.0, jnp.minimum(as_float(logits) - offset[..., None], _MAX_LOG_SCORE))


def _log_expm1_sigma(alpha: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(1.0 - alpha, _MIN_NOISE)) - jnp.log(alpha)


def sedd_nelbo(
    log_score: jax.Array,
    z_t: jax.Array,
    x: jax.Array,
    alpha_t: jax.typing.ArrayLike,
    dalpha_t: jax.typing.ArrayLike,
    mask_id: int,
) -> jax.Array:
    """dsigma (sum_j s_j - r log s_x + r (log r - 1)) at masked tokens (SEDD, eq. 5): the denoising score entropy.

    log_score `[..., K]`, z_t and x int `[...]`, to `[...]`; j over the non-masks, r = 1/expm1(sigma) and
    dsigma = -alpha'/alpha. Computed as the sum of s_j over j != x plus r (y - 1 - log y), y = s_x / r, both non-negative.
    """
    alpha, dalpha = (as_float(per_token(value, x.shape)) for value in (alpha_t, dalpha_t))
    log_rate = -_log_expm1_sigma(alpha)
    log_score = as_float(log_score)
    others = ~is_entry(mask_id, log_score) & ~is_entry(x, log_score)
    log_y = take(log_score, x) - log_rate
    entropy = jnp.sum(jnp.where(others, jnp.exp(log_score), 0.0), axis=-1)
    entropy = entropy + jnp.exp(log_rate) * excess(jnp.expm1(log_y), log_y)
    return jnp.where(z_t == mask_id, -dalpha / alpha * entropy, 0.0)


def sedd_step(
    keys: jax.Array, log_score: jax.Array, z_t: jax.Array, dsigma: jax.typing.ArrayLike, mask_id: int
) -> jax.Array:
    """SEDD's analytic step (SEDD, eq. 17-19) over dsigma = sigma_t - sigma_s as a mixture: int32 `[...]`.

    keys `[...]`, log_score `[..., K]`. The staggered score times the transposed transition reveals a masked token with
    probability expm1(dsigma) sum_j s_j, j over the non-masks, and then draws token j in proportion to s_j.
    """
    dsigma = per_token(dsigma, z_t.shape)

    def noise(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        reveal_key, draw_key = jax.random.split(key)
        return jax.random.uniform(reveal_key), draw_key

    u, draw_keys = map_keys(noise, keys)
    drawn, log_total = categorical.draw_with_log_normaliser(draw_keys, without(as_float(log_score), mask_id))
    reveals = (z_t == mask_id) & (u < jnp.expm1(dsigma) * jnp.exp(log_total))
    return jnp.where(reveals, drawn, z_t).astype(jnp.int32)


def sedd_probabilities(log_score: jax.Array, z_t: jax.Array, dsigma: jax.typing.ArrayLike, mask_id: int) -> jax.Array:
    """The distribution that `sedd_step` draws from, as a dense table `[..., K]`: staggered score times transition.

    The mask's probability is 1 - expm1(dsigma) sum_j s_j, or 0 if the score is too large for the step; then normalised.
    """
    vocab_size = log_score.shape[-1]
    score = jnp.exp(without(as_float(log_score), mask_id))
    growth = jnp.expm1(per_token(dsigma, z_t.shape))
    stays = jnp.maximum(1.0 - growth * jnp.sum(score, axis=-1), 0.0)
    masked = growth[..., None] * score + stays[..., None] * jax.nn.one_hot(mask_id, vocab_size)
    masked = masked / jnp.sum(masked, axis=-1, keepdims=True)
    return jnp.where((z_t == mask_id)[..., None], masked, jax.nn.one_hot(z_t, vocab_size))


def d3pm_nelbo(
    logits: jax.Array,
    z_t: jax.Array,
    x: jax.Array,
    alpha_t: jax.typing.ArrayLike,
    mask_id: int,
    n_steps: int = 1000,
) -> jax.Array:
    """T KL(q(z_s | z_t, x) || p(z_s | z_t)) of the T-step chain with alpha = 1 - t and s = t - 1/T (D3PM, eq. 1).

    logits `[..., K]`, z_t and x int `[...]`, to `[...]`; the loss is 0 at unmasked tokens. The mean over t in {1/T, ..., 1}
    is the sum of the chain's terms; `d3pm_reconstruction` is the term at its end. The network may put mass on the mask,
    and p(z_s | z_t) is proportional to sum_j p_j q(z_s, z_t | x = j) (D3PM, eq. 4).

    With m the mask, r = (alpha_s - alpha_t)/(1-alpha_t), o_s = alpha_s/(1-alpha_s) p_m and o_t likewise, the divergence is
    r (log(1 + o_s) - log p_x) - log(1 + p_m r/((1-alpha_s)(1 + o_t))),
    every term of order 1/T, so that the factor T magnifies no rounding. Where alpha_s = 1, its limit is
    log(1 + o_t) - log p_x.

    Raises:
        UserError: `n_steps` below 1, or an alpha_t of another shape.
    """
    if n_steps < 1:
        raise UserError(f"D3PM's number of steps must be at least 1, not {n_steps}")
    alpha_t = as_float(per_token(alpha_t, x.shape))
    noise_t = jnp.maximum(1.0 - alpha_t, _MIN_NOISE)
    r = jnp.minimum(1.0 / (n_steps * noise_t), 1.0)
    # 1 - alpha_s. The last step, t = 1/T, must leave exactly no noise, despite rounding; other t are multiples of 1/T.
    noise_s = jnp.where(noise_t * n_steps < 1.5, 0.0, noise_t - 1.0 / n_steps)
    p_m = jnp.exp(-nll(logits, jnp.full_like(x, mask_id)))
    o_t = p_m * alpha_t / noise_t
    nonzero_noise_s = jnp.where(noise_s > 0.0, noise_s, 1.0)
    o_s = p_m * (1.0 - nonzero_noise_s) / nonzero_noise_s
    terms_in_p_m = r * jnp.log1p(o_s) - jnp.log1p(p_m * r / (nonzero_noise_s * (1.0 + o_t)))
    terms_in_p_m = jnp.where(noise_s > 0.0, terms_in_p_m, jnp.log1p(o_t))
    return jnp.where(z_t == mask_id, n_steps * (r * nll(logits, x) + terms_in_p_m), 0.0)


def d3pm_reconstruction(logits: jax.Array, x: jax.Array) -> jax.Array:
    """-log p(x | z_0), `[...]`, from the network's logits `[..., K]` at the chain's end (sigma = 0); x int `[...]`."""
    return nll(logits, x)


def ar_nll(logits: jax.Array, x: jax.Array, mask_id: int | None = None) -> jax.Array:
    """Next-token cross-entropy: logits `[B, L, K]` at positions 0 .. L-1, x int `[B, L]` at 1 .. L, to `[B, L]`.

    The distribution excludes `mask_id`, an id that never occurs in text.
    """
    return nll(logits, x, mask_id)
