"""What a transformer's block computes between its products, each function with a derivative of its own.

Between the products lie passes over memory, and on a GPU they take as long as the products do. Left to itself automatic
differentiation writes float32 intermediates down and reads them back, and sums over tokens in half precision.
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

EPSILON = 1e-5  # of LayerNorm
Optional = jax.Array | None


@jax.custom_vjp
def gelu(x: jax.Array, bias: jax.Array) -> jax.Array:
    """GELU of `x [N, D]` plus a bias `[D]`, in its tanh form; for the gradient x alone is kept."""
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
def modulated_norm(x: jax.Array, weight: jax.Array, scale: Optional, shift: Optional, dtype: jnp.dtype) -> jax.Array:
    """LayerNorm without bias, modulated: (1 + scale) weight (x - mean) / deviation + shift.

    Args:
        x: `[B, L, D]`, float32; so is all that is computed.
        weight: `[D]`.
        scale, shift: `[B, 1, D]`; None leaves them out.
        dtype: of the result `[B, L, D]`.
    """
    return _modulated_norm_forward(x, weight, scale, shift, dtype)[0]


def _modulated_norm_forward(
    x: jax.Array, weight: jax.Array, scale: Optional, shift: Optional, dtype: jnp.dtype
) -> tuple[jax.Array, tuple]:
    mean = jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True) + EPSILON)
    out = (x - mean) * inverse * _factor(weight, scale)
    out = out if shift is None else out + shift
    return out.astype(dtype), (x, weight, scale, shift, mean, inverse)


def _factor(weight: jax.Array, scale: Optional) -> jax.Array:
    return weight if scale is None else weight * (1 + as_float(scale))


def _modulated_norm_backward(dtype: jnp.dtype, residuals: tuple, cotangent: jax.Array) -> tuple:
    x, weight, scale, shift, mean, inverse = residuals

    def normal(x: jax.Array) -> jax.Array:
        return (x - mean) * inverse

    by_text = jnp.sum(as_float(cotangent) * normal(x), axis=1, keepdims=True)
    d_weight = jnp.sum(by_text if scale is None else by_text * (1 + as_float(scale)), axis=(0, 1))
    d_scale = None if scale is None else (by_text * weight).astype(scale.dtype)
    d_shift = None if shift is None else jnp.sum(as_float(cotangent), axis=1, keepdims=True).astype(shift.dtype)

    x = recompute_after(x, by_text)
    d_normal = as_float(recompute_after(cotangent, by_text)) * _factor(weight, scale)
    along = jnp.mean(d_normal * normal(x), axis=-1, keepdims=True)
    d_x = inverse * (d_normal - jnp.mean(d_normal, axis=-1, keepdims=True) - normal(x) * along)
    return d_x, d_weight, d_scale, d_shift


modulated_norm.defvjp(_modulated_norm_forward, _modulated_norm_backward)


def dropout_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> tuple[jax.Array, float]:
    """Returns which entries of `shape [..., D]`, D even, dropout lets through, and the share that it does.

    Sixteen random bits an entry: the share is 1 - rate to a part in 65,536, and two entries share what a word costs, which
    on a GPU is more than to read and write them.
    """
    passing = max(1, round((1 - rate) * 2**16))
    words = jax.random.bits(key, (*shape[:-1], shape[-1] // 2), jnp.uint32)
    numbers = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(shape)
    return numbers <= np.uint16(passing - 1), passing / 2**16


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def gated_sum(x: jax.Array, y: jax.Array, bias: Optional, gate: Optional, kept: Optional, share: float) -> jax.Array:
    """The residual stream and what a branch adds: x + gate dropout(y + bias).

    Args:
        x: `[B, L, D]`, float32; so is the result.
        y: `[B, L, D]`.
        bias: `[D]`, or None.
        gate: `[B, 1, D]`, or None for 1.
        kept, share: see `dropout_mask`; None and 1 without dropout.
    """
    y = as_float(y) if bias is None else as_float(y) + bias
    y = y if kept is None else jnp.where(kept, y / share, 0)
    return x + (y if gate is None else gate * y)


def _gated_sum_forward(
    x: jax.Array, y: jax.Array, bias: Optional, gate: Optional, kept: Optional, share: float
) -> tuple[jax.Array, tuple]:
    return gated_sum(x, y, bias, gate, kept, share), (y, bias, gate, kept)


def _gated_sum_backward(share: float, residuals: tuple, cotangent: jax.Array) -> tuple:
    y, bias, gate, kept = residuals
    through = cotangent if kept is None else jnp.where(kept, cotangent / share, 0)
    d_y = (through if gate is None else through * gate).astype(y.dtype)
    by_text = jnp.sum(through, axis=1, keepdims=True)
    d_bias = None if bias is None else jnp.sum(by_text if gate is None else by_text * gate, axis=(0, 1))
    d_gate = None
    if gate is not None:
        d_gate = jnp.sum(through * y, axis=1, keepdims=True)
        d_gate = (d_gate if bias is None else d_gate + bias * by_text).astype(gate.dtype)
    return cotangent, d_y, d_bias, d_gate, None


gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


@jax.custom_vjp
def heads_of(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys, turned by their positions, and values, `[B, L, H, head_dim]` each, of `qkv [B, L, 3 D]`."""
    q, k, v = (part.reshape(*part.shape[:2], -1, cos.shape[-1]) for part in jnp.split(qkv, 3, axis=-1))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _heads_of_forward(qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[tuple, tuple]:
    return heads_of(qkv, cos, sin), (cos, sin)


def _heads_of_backward(residuals: tuple, cotangents: tuple) -> tuple[jax.Array, None, None]:
    """A turn's derivative is the turn back. Written once: two products read it, and XLA would make it for each."""
    cos, sin = residuals
    q, k, v = cotangents
    parts = rotate(q, cos, -sin), rotate(k, cos, -sin), v
    return materialise_once(jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)), None, None


heads_of.defvjp(_heads_of_forward, _heads_of_backward)
