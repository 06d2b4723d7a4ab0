"""The vocabulary head, applied in chunks of tokens so that no `[B, L, K]` array exists at K = 50k.

A float32 `[B, L, K]` takes 6.1 GiB at B = 32, L = 1024, K = 50,258. Losses and samplers need only a few numbers per
token from it: they are functions of one chunk's logits, which are computed chunk by chunk and again in the backward pass.
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


def in_chunks(fn: Callable[..., Any], *per_token: Any, chunk: int) -> Any:
    """Returns `fn(*per_token)` by calling it on `chunk` positions of every row at a time, again in the backward pass.

    Chunks run along the length, so a batch that is split over devices stays split.

    Args:
        fn: maps pytrees of `[B, l, ...]` to a pytree of `[B, l, ...]`, each token by itself.
        *per_token: pytrees of `[B, L, ...]`.
        chunk: l; see `chunk_length`.
    """
    length = jax.tree.leaves(per_token)[0].shape[1]
    chunks = -(-length // chunk)
    if chunks == 1:
        return fn(*per_token)

    # The last chunk is filled up with copies of the last position, whose results are dropped.
    source = jnp.minimum(jnp.arange(chunks * chunk), length - 1)

    def cut(x: jax.Array) -> jax.Array:
        x = x if chunks * chunk == length else x[:, source]
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * chunk, *x.shape[3:])[:, :length]

    out = jax.lax.map(jax.checkpoint(lambda args: fn(*args)), jax.tree.map(cut, per_token))
    return jax.tree.map(join, out)
