"""Draws the largest of many normals, and which tokens have them, without drawing all of them."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import ndtri


def top_normals(key: jax.Array, shape: tuple[int, ...], n: int, k: int) -> jax.Array:
    """The k largest of n independent standard normals, descending: float32 `[*shape, k]`, exact in distribution."""
    gaps = jax.random.exponential(key, (*shape, k), jnp.float32)
    return normals_from_gaps(gaps, n)


def normals_from_gaps(gaps: jax.Array, n: int) -> jax.Array:
    """The k largest of n normals from k standard exponentials `[..., k]` (Rényi's representation), descending.

    The largest of n uniforms is U^(1/n), the next is that times U'^(1/(n-1)), and so on: in logarithms, a running sum
    of exponentials. The quantile comes from the smaller tail, because 1 - u has lost u's digits.
    """
    k = gaps.shape[-1]
    log_u = -jnp.cumsum(gaps / (n - jnp.arange(k)), axis=-1)
    upper = -jnp.expm1(log_u)
    z = jnp.where(upper < 0.5, -ndtri(jnp.minimum(upper, 0.5)), ndtri(jnp.minimum(jnp.exp(log_u), 0.5)))
    # Rounding may put quantiles slightly out of order; callers rely on the order.
    return lax.cummin(z, axis=z.ndim - 1)


def distinct_others(key: jax.Array, x: jax.Array, k: int, vocab_size: int) -> jax.Array:
    """Draws k distinct tokens other than x, uniformly and in random order: x int `[...]`, to int32 `[..., k]`.

    These are the first k steps of a Fisher-Yates shuffle of the K-1 others that stores only the swaps: k^2 comparisons.
    """
    partners = jax.random.randint(key, (*x.shape, k), jnp.arange(k), vocab_size - 1, jnp.int32)
    ranks = shuffle_prefix(partners)
    return ranks + (ranks >= x[..., None])


def shuffle_prefix(partners: jax.Array) -> jax.Array:
    """The first k of 0, 1, 2, ... after swapping place j with place `partners[..., j]` >= j, for j = 0 .. k-1."""
    places = jnp.arange(partners.shape[-1], dtype=jnp.int32)

    def value_at(place: jax.Array, j: jax.Array, moved: jax.Array) -> jax.Array:
        """The value at `place [...]` before swap j: the latest earlier swap's, or the place's own number."""
        hits = (partners == place[..., None]) & (places < j)
        latest = jnp.max(jnp.where(hits, places, -1), axis=-1)
        value = jnp.take_along_axis(moved, jnp.maximum(latest, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(latest >= 0, value, place)

    def swap(moved: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array]:
        partner = lax.dynamic_index_in_dim(partners, j, axis=-1, keepdims=False)
        chosen = value_at(partner, j, moved)
        displaced = value_at(jnp.full_like(partner, j), j, moved)
        return lax.dynamic_update_index_in_dim(moved, displaced, j, axis=-1), chosen

    _, chosen = lax.scan(swap, jnp.zeros_like(partners), places)
    return jnp.moveaxis(chosen, 0, -1)
