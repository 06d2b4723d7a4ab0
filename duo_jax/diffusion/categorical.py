"""Large categorical distributions in float32, in few passes over the vocabulary: drawing, nucleus, likelihood."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from duo_jax.diffusion.arrays import as_float, in_one_pass, is_entry, map_keys, take, top_and_sum
from duo_jax.errors import UserError

# Allowed rounding error of a sum of probabilities in float32: .5 + .3 + .15 must not exceed top_p = .95.
_MASS_ROUNDING = 1.2e-7


def _gumbel(key: jax.Array, n: int) -> jax.Array:
    # The default float32 Gumbel never exceeds about 16, which makes every token rarer than 1e-7 rarer still.
    return jax.random.gumbel(key, (n,), jnp.float32, mode="high")


def _block_size(vocab_size: int) -> int:
    return math.isqrt(vocab_size - 1) + 1


# A CPU accepts plain sums of exponentials if each row's largest lies in this range, where float32 is accurate.
_SAFE_SUMS = 1e-20, 1e30


def _block_log_sums(logits: jax.Array, size: int) -> jax.Array:
    """log-sum-exp of each run of `size` logits: `[..., K]` to `[..., ceil(K / size)]`, in one pass if possible."""
    # Three ways to the same sums:
    # - one_pass, on an accelerator: largest and sum in a single reduction. The lax.cond below would not help there: if both
    #   branches only reduce, XLA evaluates both and selects.
    # - plain_sums, on a CPU: a network's logits are moderate, so their exponentials can usually be summed without
    #   subtracting the largest, which saves a pass.
    # - two_passes, the fallback on a CPU: the stable log-sum-exp, if a row's largest sum falls outside _SAFE_SUMS.

    def blocks(values: jax.Array, fill: float) -> jax.Array:
        # The padding fuses into the reductions: no padded copy of the vocabulary is written.
        widths = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % size)]
        return jnp.pad(values, widths, constant_values=fill).reshape(*values.shape[:-1], -1, size)

    def one_pass(logits: jax.Array) -> jax.Array:
        top, total = in_one_pass(blocks(logits, -jnp.inf), jnp.asarray(True))
        return top + jnp.log(total)

    def two_passes(logits: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(blocks(logits, -jnp.inf), axis=-1)

    def plain_sums(logits: jax.Array) -> jax.Array:
        sums = jnp.sum(blocks(jnp.exp(logits), 0.0), axis=-1)
        largest, (low, high) = jnp.max(sums, axis=-1), _SAFE_SUMS
        safe = jnp.all((largest > low) & (largest < high))
        return lax.cond(safe, lambda _: jnp.log(sums), two_passes, logits)

    return lax.platform_dependent(logits, cpu=plain_sums, default=one_pass)


def draw_with_log_normaliser(keys: jax.Array, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws one token from softmax(logits), and returns log sum exp(logits) too, which the draw computes anyway.

    keys `[...]`: one typed key per token. logits `[..., K]`, -inf where a token is impossible. Returns ids int32 `[...]`
    and the log-normaliser `[...]`.

    Gumbel argmax on two levels: first over blocks of about sqrt(K) tokens by their total mass, then within the chosen
    block. The draw is exact and needs 2 sqrt(K) random numbers instead of K.
    """
    logits = as_float(logits)
    vocab_size = logits.shape[-1]
    size = _block_size(vocab_size)
    block_logits = _block_log_sums(logits, size)
    n_blocks = block_logits.shape[-1]

    noise = map_keys(lambda key: _gumbel(key, n_blocks + size), keys)
    block_noise, token_noise = noise[..., :n_blocks], noise[..., n_blocks:]
    block = jnp.argmax(block_logits + block_noise, axis=-1)
    ids = block[..., None] * size + jnp.arange(size)
    within = jnp.take_along_axis(logits, jnp.minimum(ids, vocab_size - 1), axis=-1)
    within = jnp.where(ids < vocab_size, within + token_noise, -jnp.inf)
    chosen = block * size + jnp.argmax(within, axis=-1)
    return chosen.astype(jnp.int32), jax.nn.logsumexp(block_logits, axis=-1)


def draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws one token from softmax(logits): keys `[...]` (one per token), logits `[..., K]`, to ids int32 `[...]`."""
    return draw_with_log_normaliser(keys, logits)[0]


def nucleus(logits: jax.Array, top_p: jax.typing.ArrayLike) -> jax.Array:
    """Keeps the most probable tokens of total mass `top_p`, and sets the other logits to -inf (not renormalised).

    logits `[..., K]`; `top_p` in (0, 1] a scalar (may be traced) or `[...]`. A token stays if the mass of all strictly
    more probable tokens is at most `top_p`, up to float32's rounding. So the token that takes the mass beyond `top_p`
    stays, as do its exact ties; if the mass reaches `top_p` exactly, the next token stays as well.

    Raises:
        UserError: `top_p` is a Python number outside (0, 1]; an array is not checked.
    """
    if isinstance(top_p, int | float) and not 0.0 < top_p <= 1.0:
        raise UserError(f"top_p must lie in (0, 1], not {top_p}")
    top_p = jnp.asarray(top_p)
    # At 1.0 every token must stay, although a sum rounded to above 1 would cut the tail.
    return lax.cond(jnp.all(top_p >= 1.0), lambda values: values, lambda values: _cut_tail(values, top_p), logits)


def _cut_tail(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Finds the threshold by bisection on the bits of a float: exact, one pass over K per bit, no sort and no copy."""
    values = as_float(logits).astype(jnp.float32)
    top = jnp.max(values, axis=-1, keepdims=True)
    log_total = jax.nn.logsumexp(values - top, axis=-1)
    tokens = values.shape[:-1]

    def depth(values: jax.Array) -> jax.Array:
        # Bit patterns order non-negative floats correctly, so this is top - logit on an integer scale.
        return lax.bitcast_convert_type(jnp.maximum(top - values, 0.0), jnp.int32)

    def mass_above(limit: jax.Array) -> jax.Array:
        """Total probability of the tokens whose depth is strictly less than `limit`."""
        weight = jnp.exp(values - top - log_total[..., None])
        return jnp.sum(jnp.where(depth(values) < limit[..., None], weight, 0.0), axis=-1)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # a token at depth `low` stays, one at depth `high` goes
        middle = low + (high - low) // 2
        stays = mass_above(middle) <= top_p + _MASS_ROUNDING
        return jnp.where(stays, middle, low), jnp.where(stays, high, middle)

    # 0x7F800000 is infinity. After 31 halvings the bounds are neighbouring floats.
    bounds = jnp.zeros(tokens, jnp.int32), jnp.full(tokens, 0x7F800001, jnp.int32)
    limit, _ = lax.fori_loop(0, 31, halve, bounds)
    cut = jnp.where(jnp.broadcast_to(top_p, tokens) >= 1.0, 0x7F800000, limit)
    return jnp.where(depth(values) <= cut[..., None], logits, -jnp.inf)


# Replaces log 0 in values that are subtracted or multiplied later: its exponential is 0, and it never becomes a NaN.
IMPOSSIBLE = -1e6


def without(logits: jax.Array, banned: int | None) -> jax.Array:
    """The logits `[..., K]` with the token `banned` made impossible; None bans nothing."""
    if banned is None:
        return logits
    return jnp.where(is_entry(banned, logits), jnp.asarray(IMPOSSIBLE, logits.dtype), logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def nll(logits: jax.Array, x: jax.Array, banned: int | None = None) -> jax.Array:
    """Cross-entropy -log softmax(logits)_x in nats, `[...]`: logits `[..., K]`, x int `[...]`; never `banned`.

    It takes two passes over the vocabulary forward and one backward; the gradient is the only temporary of its size.
    """
    return _nll_forward(logits, x, banned)[0]


def _nll_forward(logits: jax.Array, x: jax.Array, banned: int | None) -> tuple[jax.Array, tuple]:
    values = without(as_float(logits), banned)
    top, rest = top_and_sum(values, ~is_entry(x, values))
    depth = take(values, x) - top
    own = jnp.exp(depth)
    # If x is likely, use the mass of the others: log(rest + own) would round a confident network's small loss to 0.
    likely = own > 0.1
    loss = jnp.where(likely, jnp.log1p(rest / jnp.where(likely, own, 1.0)), jnp.log(rest + own) - depth)
    return loss, (logits, x, top, rest, own)


def _nll_backward(banned: int | None, residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, None]:
    logits, x, top, rest, own = residuals
    scale = cotangent / (rest + own)
    slope = scale[..., None] * jnp.exp(without(as_float(logits), banned) - top[..., None])
    slope = jnp.where(is_entry(x, logits), -(scale * rest)[..., None], slope)
    if banned is not None:
        slope = jnp.where(is_entry(banned, logits), 0.0, slope)
    return slope.astype(logits.dtype), None


nll.defvjp(_nll_forward, _nll_backward)
