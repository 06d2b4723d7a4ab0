"""The vocabulary head, visited in chunks of tokens so that no `[B, L, K]` array exists at K = 50k.

A float32 `[B, L, K]` takes 6.1 GiB at B = 32, L = 1024, K = 50,258. Losses and samplers need only a few numbers per
token from it, so they hand a function of one chunk's logits to `visit`, which computes the logits chunk by chunk and again
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# A visitor's intermediates (softmax, log pbar and their gradients) live beside the logits themselves.
_ARRAYS_PER_CHUNK = 4


def chunk_length(batch: int, length: int, vocab_size: int, mib: int) -> int:
    """Returns how many positions of every row one chunk may take for its logits and their kin to fit in `mib` MiB."""
    per_position = batch * vocab_size * 4 * _ARRAYS_PER_CHUNK
    fits = max(1, mib * 2**20 // per_position)
    chunks = -(-length // min(fits, length))
    return -(-length // chunks)


def logits(hidden: jax.Array, head: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
    """Returns `hidden [..., D] @ kernel [D, K] + bias [K]`, multiplied in `dtype` and accumulated in float32."""
    product = jnp.matmul(hidden.astype(dtype), head["kernel"].astype(dtype), preferred_element_type=jnp.float32)
    return product + head["bias"]


def visit(
    fn: Callable[..., Any],
    hidden: jax.Array,
    head: dict[str, jax.Array],
    *per_token: Any,
    dtype: jnp.dtype,
    chunk: int,
) -> Any:
    """Returns `fn(logits [B, L, K], *per_token)` without ever holding all the logits.

    Chunks run along the length, so a batch that is split over devices stays split.

    Args:
        fn: maps `(logits [B, l, K] float32, *args [B, l, ...])` to a pytree of `[B, l, ...]`, each token by itself.
        hidden: `[B, L, D]`.
        head: `kernel [D, K]` and `bias [K]`.
        *per_token: pytrees of `[B, L, ...]`, cut as the tokens are.
        dtype: compute type of the product.
        chunk: positions of every row that are visited at once; see `chunk_length`.
    """

    def piece(args: tuple[Any, ...]) -> Any:
        hidden, *rest = args
        return fn(logits(hidden, head, dtype), *rest)

    length = hidden.shape[1]
    chunks = -(-length // chunk)
    if chunks == 1:
        return piece((hidden, *per_token))

    # The last chunk is filled up with copies of the last position, whose results are dropped.
    source = jnp.minimum(jnp.arange(chunks * chunk), length - 1)

    def cut(x: jax.Array) -> jax.Array:
        x = x if chunks * chunk == length else x[:, source]
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * chunk, *x.shape[3:])[:, :length]

    out = jax.lax.map(jax.checkpoint(piece), jax.tree.map(cut, (hidden, *per_token)))
    return jax.tree.map(join, out)
