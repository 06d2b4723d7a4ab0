"""The operations of a transformer block between its matrix products, each with its own derivative.

These operations are limited by memory, and on a GPU they take as long as the matrix products. Automatic differentiation
would store float32 intermediates and read them back, and would sum over tokens in half precision.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from duo_jax.diffusion.arrays import as_float, materialise_once, recompute_after
from duo_jax.models.attention import rotate
from duo_jax.models.head import sum_of_rows

EPSILON = 1e-5  # added to LayerNorm's variance
OptionalArray = jax.Array | None


@jax.custom_vjp
def gelu(x: jax.Array, bias: jax.Array) -> jax.Array:
    """GELU, in its tanh form, of `x [N, D]` plus a bias `[D]`; keeps only its arguments for the gradient."""
    return nn.gelu(as_float(x) + bias, approximate=True).astype(x.dtype)


def _gelu_forward(x: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple]:
    return gelu(x, bias), (x, bias)


def _gelu_backward(residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, bias = residuals
    slope = jax.vjp(functools.partial(nn.gelu, approximate=True), as_float(recompute_after(x, cotangent)) + bias)[1]
    d_x = slope(as_float(cotangent))[0].astype(x.dtype)
    return d_x, sum_of_rows(d_x).astype(bias.dtype)


gelu.defvjp(_gelu_forward, _gelu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def modulated_norm(
    x: jax.Array, weight: jax.Array, scale: OptionalArray, shift: OptionalArray, dtype: jnp.dtype
) -> jax.Array:
    """LayerNorm without bias, modulated: (1 + scale) weight (x - mean) / deviation + shift.

    Args:
        x: `[B, L, D]`, float32, which is also the type of all intermediates.
        weight: `[D]`.
        scale, shift: `[B, 1, D]`; None omits them.
        dtype: the type of the result `[B, L, D]`.
    """
    return _modulated_norm_forward(x, weight, scale, shift, dtype)[0]


def _modulated_norm_forward(
    x: jax.Array, weight: jax.Array, scale: OptionalArray, shift: OptionalArray, dtype: jnp.dtype
) -> tuple[jax.Array, tuple]:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + EPSILON)
    out = (x - mean) * inverse * _factor(weight, scale)
    out = out if shift is None else out + shift
    return out.astype(dtype), (x, weight, scale, shift, mean, inverse)


def _factor(weight: jax.Array, scale: OptionalArray) -> jax.Array:
    return weight if scale is None else weight * (1 + as_float(scale))


def _modulated_norm_backward(
    dtype: jnp.dtype, residuals: tuple, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, OptionalArray, OptionalArray]:
    x, weight, scale, shift, mean, inverse = residuals

    def normal(x: jax.Array) -> jax.Array:
        return (x - mean) * inverse

    summed_by_row = jnp.sum(as_float(cotangent) * normal(x), axis=1, keepdims=True)
    d_weight = jnp.sum(summed_by_row if scale is None else summed_by_row * (1 + as_float(scale)), axis=(0, 1))
    d_scale = None if scale is None else (summed_by_row * weight).astype(scale.dtype)
    d_shift = None if shift is None else jnp.sum(as_float(cotangent), axis=1, keepdims=True).astype(shift.dtype)

    x = recompute_after(x, summed_by_row)
    d_normal = as_float(recompute_after(cotangent, summed_by_row)) * _factor(weight, scale)
    projection = jnp.mean(d_normal * normal(x), axis=-1, keepdims=True)
    d_x = inverse * (d_normal - jnp.mean(d_normal, axis=-1, keepdims=True) - normal(x) * projection)
    return d_x, d_weight, d_scale, d_shift


modulated_norm.defvjp(_modulated_norm_forward, _modulated_norm_backward)


def dropout_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> tuple[jax.Array, float]:
    """Returns a mask of the entries of `shape [..., D]`, D even, that dropout keeps, and the share that it keeps.

    It draws 16 random bits per entry, so the share is a multiple of 1/65,536 near 1 - rate. Two entries share one 32-bit
    word, which on a GPU costs more to generate than they cost to read and write.
    """
    n_kept_values = max(1, round((1 - rate) * 2**16))
    words = jax.random.bits(key, (*shape[:-1], shape[-1] // 2), jnp.uint32)
    numbers = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(shape)
    return numbers <= np.uint16(n_kept_values - 1), n_kept_values / 2**16


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def gated_sum(
    x: jax.Array, y: jax.Array, bias: OptionalArray, gate: OptionalArray, kept: OptionalArray, share: float
) -> jax.Array:
    """The residual stream plus a branch: x + gate dropout(y + bias).

    Args:
        x: `[B, L, D]`, float32, as is the result.
        y: `[B, L, D]`.
        bias: `[D]`, or None.
        gate: `[B, 1, D]`, or None for 1.
        kept, share: the results of `dropout_mask`; None and 1 without dropout.
    """
    y = as_float(y) if bias is None else as_float(y) + bias
    y = y if kept is None else jnp.where(kept, y / share, 0)
    return x + (y if gate is None else gate * y)


def _gated_sum_forward(
    x: jax.Array, y: jax.Array, bias: OptionalArray, gate: OptionalArray, kept: OptionalArray, share: float
) -> tuple[jax.Array, tuple]:
    return gated_sum(x, y, bias, gate, kept, share), (y, bias, gate, kept)


def _gated_sum_backward(
    share: float, residuals: tuple, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, OptionalArray, OptionalArray, None]:
    y, bias, gate, kept = residuals
    through = cotangent if kept is None else jnp.where(kept, cotangent / share, 0)
    d_y = (through if gate is None else through * gate).astype(y.dtype)
    summed_by_row = jnp.sum(through, axis=1, keepdims=True)
    d_bias = None if bias is None else jnp.sum(summed_by_row if gate is None else summed_by_row * gate, axis=(0, 1))
    d_gate = None
    if gate is not None:
        d_gate = jnp.sum(through * y, axis=1, keepdims=True)
        d_gate = (d_gate if bias is None else d_gate + bias * summed_by_row).astype(gate.dtype)
    return cotangent, d_y, d_bias, d_gate, None


gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


@jax.custom_vjp
def heads_of(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits `qkv [B, L, 3 D]` into queries and keys, both rotated, and values, each `[B, L, H, head_dim]`."""
    q, k, v = (part.reshape(*part.shape[:2], -1, cos.shape[-1]) for part in jnp.split(qkv, 3, axis=-1))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _heads_of_forward(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[tuple, tuple]:
    return heads_of(qkv, cos, sin), (cos, sin)


def _heads_of_backward(residuals: tuple, cotangents: tuple) -> tuple[jax.Array, None, None]:
    """Rotates back. Two matrix products read the result, and XLA would otherwise compute it for each of them."""
    cos, sin = residuals
    q, k, v = cotangents
    parts = rotate(q, cos, -sin), rotate(k, cos, -sin), v
    return materialise_once(jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)), None, None


heads_of.defvjp(_heads_of_forward, _heads_of_backward)
