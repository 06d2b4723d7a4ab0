"""Array helpers: per-sequence values for per-token arrays, one random key per token, hints for the compiler."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax.errors import UserError


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError if there are fewer than two tokens to choose between; a traced number is not checked."""
    if not isinstance(vocab_size, jax.core.Tracer) and vocab_size < 2:
        raise UserError(f"vocab_size must be at least 2, not {vocab_size}")


def per_token(value: jax.typing.ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts a signal level to the tokens: scalar, `[B]`, `[B, 1]` or `[B, L]` to `shape` = `[B, L]`.

    Axes are matched from the left, so `[B]` means one value per sequence even if B = L.

    Raises:
        UserError: any other shape.
    """
    value = jnp.asarray(value)
    if value.ndim > len(shape) or any(have not in (1, want) for have, want in zip(value.shape, shape, strict=False)):
        raise UserError(f"a signal level of shape {value.shape} does not fit tokens of shape {shape}")
    return jnp.broadcast_to(value.reshape(value.shape + (1,) * (len(shape) - value.ndim)), shape)


def token_keys(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One typed key per token, of the given shape: a draw does not depend on how the tokens are cut into chunks."""
    return jax.random.split(_typed(key), shape)


def _typed(key: jax.Array) -> jax.Array:
    """Converts a raw key, as from `jax.random.PRNGKey`: `map_keys` needs the array's shape to be that of the keys."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def numbered_keys(key: jax.Array, n: int) -> jax.Array:
    """Typed keys `[n]`, one per row; that of row i is the same for every n > i."""
    return jax.vmap(functools.partial(jax.random.fold_in, _typed(key)))(jnp.arange(n))


def keys_of_rows(keys: jax.Array, length: int) -> jax.Array:
    """Typed keys `[B, length]` from a key for each row, `[B]`: a row's keys do not depend on the other rows."""
    return map_keys(lambda key: jax.random.split(key, length), keys)


def map_keys(function: Callable[[jax.Array], Any], keys: jax.Array) -> Any:
    """Applies a function of one key to keys of any shape `[...]`; each output `[o]` becomes `[..., o]`."""
    outputs = jax.vmap(function)(keys.reshape(-1))
    return jax.tree.map(lambda out: out.reshape(keys.shape + out.shape[1:]), outputs)


def is_entry(ids: jax.typing.ArrayLike, values: jax.Array) -> jax.Array:
    """Mask `[..., K]` of the entry `ids [...]` in each row of `values [..., K]`; `ids` may be one id for all rows."""
    return jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1) == jnp.asarray(ids)[..., None]


@jax.custom_vjp
def take(values: jax.Array, ids: jax.Array) -> jax.Array:
    """The entry of `values [..., K]` at `ids [...]`, shape `[...]`."""
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def _take_forward(values: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple]:
    return take(values, ids), (values, ids)


def _take_backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, None]:
    """Autodiff would scatter the gradient into an array of zeros, which XLA fuses with nothing else."""
    values, ids = residuals
    return jnp.where(is_entry(ids, values), cotangent[..., None], 0).astype(values.dtype), None


take.defvjp(_take_forward, _take_backward)


def top_and_sum(values: jax.Array, counts: jax.typing.ArrayLike = True) -> tuple[jax.Array, jax.Array]:
    """The largest of `values [..., K]`, and the sum of exp(value - largest) over the entries that count, both `[...]`.

    An accelerator finds both in one pass. A CPU takes two, because XLA does not vectorise a reduction of pairs there.
    There is no gradient.

    Args:
        values: float32 or wider, at least one finite entry per row; -inf adds nothing.
        counts: which entries count; bool, `[..., K]` or a scalar.
    """
    return jax.lax.platform_dependent(values, jnp.asarray(counts), cpu=in_two_passes, default=in_one_pass)


def in_two_passes(values: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `top_and_sum`. XLA can share these exponentials with other uses of them."""
    top = jnp.max(values, axis=-1)
    return top, jnp.sum(jnp.where(counts, jnp.exp(values - top[..., None]), 0.0), axis=-1)


def in_one_pass(values: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `top_and_sum`; here a row may be -inf throughout, and its sum is then 0."""

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Merges two pairs (largest, sum of exponentials relative to it); the smaller one's sum is scaled down."""
        (top_a, sum_a), (top_b, sum_b) = a, b
        smaller = jnp.exp(jnp.where(top_a == top_b, 0.0, -jnp.abs(top_a - top_b)))
        a_is_top = top_a > top_b
        total = jnp.where(a_is_top, sum_a + smaller * sum_b, smaller * sum_a + sum_b)
        return jnp.maximum(top_a, top_b), total

    ones = jnp.where(counts & ~jnp.isneginf(values), jnp.ones_like(values), 0)
    start = jnp.asarray(-jnp.inf, values.dtype), jnp.zeros((), values.dtype)
    return jax.lax.reduce((values, ones), start, join, (values.ndim - 1,))


def recompute_after(x: jax.Array, dependency: jax.Array) -> jax.Array:
    """Returns x; an accelerator recomputes everything derived from the result, and only once `dependency` is known.

    This is for values derived from a chunk's logits (such as exponentials) and read in several passes, each of which
    needs a sum from the pass before. Without this, an accelerator's compiler stores these values and reads them back,
    which takes longer than to compute them again. A CPU may keep them.
    """

    def barrier(x: jax.Array, dependency: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier((x, dependency))[0]

    return jax.lax.platform_dependent(x, dependency, cpu=lambda x, _: x, default=barrier)


def materialise_once(x: jax.Array) -> jax.Array:
    """Returns x; an accelerator computes it once and stores it, however many operations read it. A CPU is free."""
    return jax.lax.platform_dependent(x, cpu=lambda x: x, default=jax.lax.optimization_barrier)


def before_sum(x: jax.Array) -> jax.Array:
    """Returns x, for `jnp.sum(before_sum(x), axis=-1)` of products x: a CPU then computes them outside of the sum.

    The library with which XLA sums on a CPU is slower at products than XLA's own loops. It is given a few kinds of
    operations only, and the rounding here, to x's own precision, which changes nothing, is not one of them.
    """
    kind = jnp.finfo(x.dtype)
    return jax.lax.platform_dependent(
        x, cpu=lambda x: jax.lax.reduce_precision(x, kind.nexp, kind.nmant), default=lambda x: x
    )


def as_float(values: jax.typing.ArrayLike) -> jax.Array:
    """Casts to at least float32: losses and probabilities are never computed in half precision."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))
