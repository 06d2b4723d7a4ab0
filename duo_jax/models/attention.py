"""Self-attention, and the explicit choice of who computes it: cuDNN's flash attention where it can, XLA elsewhere."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax.errors import UserError

log = logging.getLogger(__name__)


def choose(
    requested: str, *, platform: str, compute_capability: float, dtype: jnp.dtype, head_dim: int
) -> tuple[str, str]:
    """Returns who computes attention, `"cudnn"` or `"xla"`, and why.

    cuDNN needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, bfloat16 or float16, and a head size that is a
    multiple of 8 and at most 128 (256 on Hopper, 9.0).

    Args:
        requested: `auto`, `xla` or `cudnn`.
        platform: `cpu`, `gpu`, `tpu`, as JAX names them.
        compute_capability: of the GPU, such as 7.5 for a T4; 0 where there is none.
        dtype: of queries, keys and values.
        head_dim: the size of one head.

    Raises:
        UserError: cuDNN was asked for by name and cannot do it.
    """
    if requested == "xla":
        return "xla", "as asked"
    obstacle = None
    if platform not in ("gpu", "cuda"):
        obstacle = f"the device is a {platform}, not an NVIDIA GPU"
    elif compute_capability < 8:
        obstacle = f"the GPU's compute capability {compute_capability} is below 8.0"
    elif dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"the compute type is {jnp.dtype(dtype).name}, not bfloat16 or float16"
    elif head_dim % 8 or head_dim > (256 if compute_capability >= 9 else 128):
        obstacle = f"a head size of {head_dim} is not supported"
    if obstacle is None:
        return "cudnn", "as asked" if requested == "cudnn" else "the device, type and head size allow it"
    if requested == "cudnn":
        raise UserError(f"config.model.attention is 'cudnn', but {obstacle}; use 'xla' or 'auto'.")
    return "xla", obstacle


@functools.cache
def backend(requested: str, dtype_name: str, head_dim: int) -> str:
    """Returns `choose` for the default device, logged once."""
    device = jax.devices()[0]
    capability = float(getattr(device, "compute_capability", 0) or 0)
    name, why = choose(
        requested,
        platform=device.platform,
        compute_capability=capability,
        dtype=jnp.dtype(dtype_name),
        head_dim=head_dim,
    )
    log.info("attention: %s (%s)", name, why)
    return name


def rotary_angles(length: int, head_dim: int, base: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines `[L, head_dim]` of rotary position embedding (Su et al., 2021), half-split pairs."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each pair (x_i, x_{i + head_dim/2}) of `x [B, L, H, head_dim]` by its position's angle, in float32."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    low, high = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-high, low], axis=-1)
    return (x * cos[:, None, :] + turned * sin[:, None, :]).astype(dtype)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, requested: str) -> jax.Array:
    """Returns softmax(q k' / sqrt(head_dim)) v, `[B, L, H, head_dim]`; the softmax is float32."""
    implementation = backend(requested, q.dtype.name, q.shape[-1])
    return _attention(q, k, v, is_causal=causal, implementation=implementation)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs: Any) -> jax.Array:
    dtype = q.dtype
    if dtype == jnp.float16 and jax.default_backend() == "cpu":
        # A CPU lacks the float16 product with a float32 sum that JAX asks for here.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, **kwargs).astype(dtype)


def attend_to_past(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the attention of one query `[B, 1, H, head_dim]` to the keys and values `[B, T, ...]` up to its position."""
    mask = (jnp.arange(k.shape[1]) <= position)[None, None, None]
    return _attention(q, k, v, mask=mask, implementation="xla")
