"""Discrete consistency distillation: pairs on one trajectory, step sizes, and the divergence to minimise.

*The Diffusion Duality* (arXiv 2506.10892, "I"), section 4.2 and algorithm 1. Tokens are `[B, L]`; gamma and t are
scalars, `[B]`, `[B, 1]` or `[B, L]`. The student sees (z_t, t) and the frozen teacher (z_s, s), s = t - dt.
"""

import jax
import jax.numpy as jnp

from duo_jax.diffusion.arrays import as_float, check_vocab_size, per_token, recompute_after, top_and_sum
from duo_jax.diffusion.order_statistics import distinct_others, top_normals
from duo_jax.diffusion.special import excess
from duo_jax.errors import UserError


def trajectory_pair(
    key: jax.Array,
    x: jax.Array,
    gamma_t: jax.typing.ArrayLike,
    gamma_s: jax.typing.ArrayLike,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Draws (z_t, z_s) = (argmax w_t, argmax w_s) of one noise eps (I, alg. 1), int32 `[B, L]`: the exact joint law.

    x int `[B, L]`, gamma_s <= gamma_t. Dividing w by its noise scale leaves mu x + eps, mu = exp(-gamma/2). x is the argmax
    if mu + eps_x exceeds the largest of the other eps; otherwise the token with that largest eps is, at both times. So
    three draws per token are enough: eps_x, the largest of K-1 normals, and the token that has it.

    Raises:
        UserError: K below 2, or a gamma of another shape.
    """
    check_vocab_size(vocab_size)
    true_key, largest_key, id_key = jax.random.split(key, 3)
    margin = top_normals(largest_key, x.shape, vocab_size - 1, 1)[..., 0] - jax.random.normal(true_key, x.shape)
    rival = distinct_others(id_key, x, 1, vocab_size)[..., 0]
    z_t, z_s = (
        jnp.where(jnp.exp(-0.5 * per_token(gamma, x.shape)) > margin, x, rival).astype(jnp.int32)
        for gamma in (gamma_t, gamma_s)
    )
    return z_t, z_s


def pair_times(t: jax.typing.ArrayLike, dt: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The two times (t', s) of a pair from a random t: t' = min(t + dt, 1) and s = max(t' - dt, 0), same shape as t."""
    later = jnp.clip(jnp.asarray(t) + dt, 0.0, 1.0)
    return later, jnp.clip(later - dt, 0.0, 1.0)


def doubling_dt(step: jax.typing.ArrayLike, round_length: int = 10_000, n_steps: int = 512) -> jax.Array:
    """dt = 2^(step // round_length) / n_steps, at most 1: each round doubles dt (I, section 5.2).

    `step` may be traced; returns float32 of its shape. A new round, and with it a new teacher, starts at every multiple of
    `round_length`.

    Raises:
        UserError: `round_length` or `n_steps` below 1.
    """
    if round_length < 1 or n_steps < 1:
        raise UserError(f"a round ({round_length}) and the number of steps ({n_steps}) must be at least 1")
    # ldexp gives exact powers of two; exp2 in float32 does not.
    n_doublings = jnp.minimum(jnp.asarray(step) // round_length, n_steps.bit_length()).astype(jnp.int32)
    return jnp.minimum(jnp.ldexp(jnp.float32(1.0), n_doublings) / n_steps, 1.0)


def linear_dt(step: jax.typing.ArrayLike, max_steps: int, dt_start: float = 1e-3, dt_end: float = 0.25) -> jax.Array:
    """dt growing linearly from dt_start at step 0 to dt_end at max_steps, constant after; float32 of step's shape.

    Raises:
        UserError: `max_steps` below 1.
    """
    if max_steps < 1:
        raise UserError(f"the number of steps over which dt grows must be at least 1, not {max_steps}")
    return dt_start + jnp.clip(jnp.asarray(step) / max_steps, 0.0, 1.0) * (dt_end - dt_start)


def kl(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats between softmax(logits_p) and softmax(logits_q), each `[..., K]`, broadcast, to `[...]`.

    The terms of the sum are p (q/p - 1 - log(q/p)) >= 0, so that float32 resolves two nearly equal networks. Apart from one
    gradient temporary for each argument, nothing of the vocabulary's size is kept.
    """
    return _kl(*jnp.broadcast_arrays(logits_p, logits_q))


@jax.custom_vjp
def _kl(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    return _kl_forward(logits_p, logits_q)[0]


def _log_normaliser(logits: jax.Array) -> jax.Array:
    top, total = top_and_sum(logits)
    return (top + jnp.log(total))[..., None]


def _kl_forward(logits_p: jax.Array, logits_q: jax.Array) -> tuple[jax.Array, tuple]:
    values_p, values_q = as_float(logits_p), as_float(logits_q)
    norm_p, norm_q = _log_normaliser(values_p), _log_normaliser(values_q)
    log_p, log_q = values_p - norm_p, values_q - norm_q
    p = jnp.exp(log_p)
    log_ratio = log_q - log_p
    # Where p is 0 the term is q. Where q/p >= e, which may overflow float32, the plain difference is accurate.
    near = p * excess(jnp.expm1(jnp.minimum(log_ratio, 1.0)), log_ratio)
    far = jnp.exp(log_q) - p - p * log_ratio
    terms = jnp.where(p > 0.0, jnp.where(log_ratio < 1.0, near, far), jnp.exp(log_q))
    divergence = jnp.sum(terms, axis=-1)
    return divergence, (logits_p, logits_q, norm_p, norm_q, divergence)


def _kl_backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_p, logits_q, norm_p, norm_q, divergence = residuals
    norm_p, norm_q = (recompute_after(norm, divergence) for norm in (norm_p, norm_q))
    log_p, log_q = as_float(logits_p) - norm_p, as_float(logits_q) - norm_q
    p = jnp.exp(log_p)
    d_p = jnp.where(p > 0.0, p * (log_p - log_q - divergence[..., None]), 0.0)
    cotangent = cotangent[..., None]
    return (cotangent * d_p).astype(logits_p.dtype), (cotangent * (jnp.exp(log_q) - p)).astype(logits_q.dtype)


_kl.defvjp(_kl_forward, _kl_backward)


def kl_backward(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """The paper's loss KL(student || teacher), mode-seeking (I, alg. 1), in nats `[...]`: logits `[..., K]` each."""
    return kl(student, teacher)


def kl_forward(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student), mass-covering: logits `[..., K]` each, to `[...]` in nats."""
    return kl(teacher, student)
