"""Uniform-state diffusion: forward process, posterior and mixture step; the NELBO is re-exported from `uniform_nelbo`.

*The Diffusion Duality* (arXiv 2506.10892, "I"). Shapes: tokens `[B, L]`, logits and probabilities `[B, L, K]`. A signal
level alpha is a scalar, `[B]`, `[B, 1]` or `[B, L]` (see `arrays.per_token`), and any other shape raises UserError.
Functions that read the vocabulary take any leading shape `[...]`, so that a caller may process tokens in chunks. Losses
are in nats.
"""

import jax
import jax.numpy as jnp

from duo_jax.diffusion import categorical
from duo_jax.diffusion.arrays import as_float, check_vocab_size, map_keys, per_token, take, token_keys
from duo_jax.diffusion.uniform_nelbo import nelbo as nelbo
from duo_jax.diffusion.uniform_nelbo import nelbo_from_logits as nelbo_from_logits


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

    This is the definition, for tests and for guidance, which needs the whole table. Samplers use `mixture_step`.
    """
    vocab_size = p.shape[-1]
    alpha_s, alpha_t = (per_token(alpha, z_t.shape)[..., None] for alpha in (alpha_s, alpha_t))
    jump = (alpha_s - alpha_t) / alpha_s
    # Both factors are multiplied by K, so that nothing is of order 1/K^2.
    transition = vocab_size * (1.0 - jump) * jax.nn.one_hot(z_t, vocab_size, dtype=p.dtype) + jump
    marginal_s = vocab_size * alpha_s * p + (1.0 - alpha_s)
    marginal_t = vocab_size * alpha_t * take(p, z_t)[..., None] + (1.0 - alpha_t)
    return transition * marginal_s / (vocab_size * marginal_t)


def _jump(alpha_s: jax.Array, alpha_t: jax.Array) -> jax.Array:
    """1 - alpha_t / alpha_s, from the difference of the two: for a short step the ratio would round to 1."""
    return jnp.where(alpha_s > alpha_t, (alpha_s - alpha_t) / alpha_s, 0.0)


def _branch(keys: jax.Array, *weights: jax.Array) -> jax.Array:
    """Draws the index int32 `[...]` of one of the weights `[...]`, in proportion to them; 0 where all are 0."""
    # mode="high" gives branches their exact rate even if it is far below 1e-7, the grid of float32's uniform numbers.
    noise = map_keys(lambda key: jax.random.gumbel(key, (len(weights),), mode="high"), keys)
    return jnp.argmax(jnp.log(jnp.stack(weights, axis=-1)) + noise, axis=-1)


def _uniform(keys: jax.Array, vocab_size: int) -> jax.Array:
    return map_keys(lambda key: prior_sample(key, (), vocab_size), keys)


def _split(keys: jax.Array) -> tuple[jax.Array, ...]:
    """Splits each key into four: whether p is needed, which branch is taken given p, the draw from p, a uniform token."""
    four = map_keys(lambda key: jax.random.split(key, 4), keys)
    return tuple(four[..., i] for i in range(4))


def draw_without_prediction(
    keys: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Draws the part of `mixture_step` that does not depend on p, and takes its arguments.

    Returns which tokens need a prediction, bool `[...]`, and z_s of all other tokens, int32 `[...]`. For the tokens that
    need one, call `draw_with_prediction` with the same keys.

    Whatever p is, the step stays at z_t with probability at least kappa a (1-alpha_s) / (1-alpha_t), which is exact for
    p_i = 0, and draws a uniform token with probability at least (1-kappa) (1-alpha_s). Drawing these two first saves
    a sampler most predictions: in n steps, a token needs about 2 log n.
    """
    alpha_s, alpha_t, kappa = (per_token(value, z_t.shape) for value in (alpha_s, alpha_t, kappa))
    branch_key, _, _, uniform_key = _split(keys)
    jump = _jump(alpha_s, alpha_t)
    stay = kappa * (1.0 - jump) * (1.0 - alpha_s)
    redraw = (1.0 - kappa) * (1.0 - alpha_s) * (1.0 - alpha_t)
    predict = kappa * jump + (1.0 - kappa) * alpha_s * (1.0 - alpha_t)  # the three weights sum to 1 - alpha_t
    branch = _branch(branch_key, stay, redraw, predict)
    needs_prediction = branch == 2
    return needs_prediction, jnp.where(branch == 1, _uniform(uniform_key, vocab_size), z_t).astype(jnp.int32)


def draw_with_prediction(
    keys: jax.Array,
    logits: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Draws z_s int32 `[...]` from logits `[..., K]`, for the tokens that need it: see `draw_without_prediction`."""
    vocab_size = logits.shape[-1]
    alpha_s, alpha_t, kappa = (per_token(value, z_t.shape) for value in (alpha_s, alpha_t, kappa))
    _, branch_key, token_key, uniform_key = _split(keys)
    drawn, log_normaliser = categorical.draw_with_log_normaliser(token_key, logits)
    signal = vocab_size * alpha_t * jnp.exp(as_float(take(logits, z_t)) - log_normaliser)
    jump, noise = _jump(alpha_s, alpha_t), 1.0 - alpha_t
    branch = _branch(
        branch_key,
        signal * (kappa * jump + (1.0 - kappa) * alpha_s * noise),
        noise * alpha_s * (kappa * jump + (1.0 - kappa) * noise),
        noise * (1.0 - alpha_s) * kappa * jump,
    )
    return jnp.select([branch == 0, branch == 1], [z_t, drawn], _uniform(uniform_key, vocab_size)).astype(jnp.int32)


def mixture_step(
    keys: jax.Array,
    logits: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
    kappa: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Draws z_s given z_t, with p = softmax(logits) in place of x, as a three-way mixture: no table, one draw.

    keys `[...]` (one per token), logits `[..., K]`, z_t int `[...]`, alpha_s >= alpha_t; returns int32 `[...]`.

    The posterior (I, eq. 3) stays at i = z_t with weight K alpha_t p_i + a (1-alpha_s), where a = alpha_t / alpha_s,
    draws from p with weight (1-a) alpha_s, and draws a uniform token with weight (1-a) (1-alpha_s). `kappa` < 1 gives
    the Psi step (arXiv 2602.21185), kappa q(z_s | z_t) + (1-kappa) [alpha_s q(z_0 | z_t) + (1-alpha_s)/K], which mixes
    the same three. `draw_without_prediction` draws what does not depend on p, `draw_with_prediction` the rest.
    """
    needs_prediction, z_s = draw_without_prediction(keys, z_t, alpha_s, alpha_t, kappa, logits.shape[-1])
    drawn = draw_with_prediction(keys, logits, z_t, alpha_s, alpha_t, kappa)
    return jnp.where(needs_prediction, drawn, z_s)


def step(
    key: jax.Array,
    log_p: jax.Array,
    z_t: jax.Array,
    alpha_s: jax.typing.ArrayLike,
    alpha_t: jax.typing.ArrayLike,
) -> jax.Array:
    """Draws z_s ~ q(z_s | z_t, x = exp(log_p)) (I, eq. 3): log_p `[B, L, K]`, z_t int `[B, L]`, to int32 `[B, L]`."""
    return mixture_step(token_keys(key, z_t.shape), log_p, z_t, alpha_s, alpha_t)
