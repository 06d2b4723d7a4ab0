"""Self-attention, with an explicit choice of the backend: cuDNN's flash attention where possible, XLA elsewhere."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

from duo_jax import hardware
from duo_jax.diffusion.arrays import as_float
from duo_jax.errors import UserError
from duo_jax.hardware import Hardware

log = logging.getLogger(__name__)


def choose(requested: str, device: Hardware, *, dtype: jnp.dtype, head_dim: int, length: int) -> tuple[str, str]:
    """Returns the backend that computes attention, `"cudnn"` or `"xla"`, and the reason.

    cuDNN needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, bfloat16 or float16, and a head size that is a
    multiple of 8 and at most 128 (256 on Hopper, 9.0). Odd lengths go to XLA, although JAX rejects only the gradient of an
    odd length with a bias.

    Args:
        requested: `auto`, `xla` or `cudnn`.
        device: the hardware that computes attention.
        dtype: the type of queries, keys and values.
        head_dim: the size of one head.
        length: the length of the text.

    Raises:
        UserError: another name, or `cudnn` is requested and impossible.
    """
    if requested not in ("auto", "xla", "cudnn"):
        raise UserError(f"attention is {requested!r}; choose auto, xla or cudnn.")
    if requested == "xla":
        return "xla", "as asked"
    obstacle, capability = None, device.compute_capability
    if device.platform not in ("gpu", "cuda"):
        obstacle = f"the device is a {device.platform}, not an NVIDIA GPU"
    elif capability < 8:
        obstacle = f"the GPU's compute capability {capability} is below 8.0"
    elif dtype not in (jnp.bfloat16, jnp.float16):
        obstacle = f"the compute type is {jnp.dtype(dtype).name}, not bfloat16 or float16"
    elif head_dim % 8 or head_dim > (256 if capability >= 9 else 128):
        obstacle = f"a head size of {head_dim} is not supported"
    elif length % 2:
        obstacle = f"the length {length} is odd"
    if obstacle is None:
        return "cudnn", "as asked" if requested == "cudnn" else "the device, type, head size and length allow it"
    if requested == "cudnn":
        raise UserError(f"config.model.attention is 'cudnn', but {obstacle}; use 'xla' or 'auto'.")
    return "xla", obstacle


def backend(requested: str, *, dtype: jnp.dtype, head_dim: int, length: int) -> str:
    """Returns the name that `choose` gives for the target hardware; logs each distinct answer once."""
    name, why = choose(requested, hardware.present(), dtype=dtype, head_dim=head_dim, length=length)
    _log_once(name, why)
    return name


@functools.cache
def _log_once(name: str, why: str) -> None:
    log.info("attention: %s (%s)", name, why)


def rotary_angles(length: int, head_dim: int, base: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines `[L, head_dim]` of rotary position embedding (Su et al., 2021), half-split pairs."""
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + head_dim/2}) of `x [B, L, H, head_dim]` by their positions' angles.

    Computed in float32 or wider.
    """
    halves = as_float(x).reshape(*x.shape[:-1], 2, -1)
    cos, sin = (angle.reshape(-1, 1, 2, halves.shape[-1]) for angle in (cos, sin))
    quarter_turn = jnp.flip(halves, axis=-2) * jnp.asarray([[-1.0], [1.0]])
    return (halves * cos + quarter_turn * sin).reshape(x.shape).astype(x.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    requested: str,
    lengths: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(q k' / sqrt(head_dim)) v, `[B, L, H, head_dim]`; the softmax is float32.

    Args:
        q: `[B, L, H, head_dim]`.
        k, v: the same shape, or with fewer heads; then equally many consecutive heads of q share each of them.
        causal: whether a token sees only itself and its past.
        requested: see `choose`.
        lengths: `[B]`, the number of tokens in each row; no token sees what follows them. None means all L.
    """
    name = backend(requested, dtype=q.dtype, head_dim=q.shape[-1], length=q.shape[1])
    if lengths is not None:
        operands = (q, k, v) if name == "cudnn" else (x.astype(_operand_type(q.dtype)) for x in (q, k, v))
        return jax.nn.dot_product_attention(
            *operands,
            is_causal=causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=name,
        ).astype(q.dtype)
    if name == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    shared = q.shape[2] // k.shape[2]
    keys_values = (_by_head(jnp.repeat(x, shared, axis=2) if shared > 1 else x) for x in (k, v))
    return _by_token(_attention(_by_head(q), *keys_values, causal), q.shape[2])


def attend_to_past(q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the attention of one query `[B, 1, H, head_dim]` to keys and values `[B, T, ...]` up to its position."""
    mask = (jnp.arange(k.shape[1]) <= position)[None, None, None]
    wide = (x.astype(_operand_type(q.dtype)) for x in (q, k, v))
    return jax.nn.dot_product_attention(*wide, mask=mask, implementation="xla").astype(q.dtype)


def _operand_type(dtype: jnp.dtype) -> jnp.dtype:
    """The type to multiply in: float32 instead of float16 on a CPU, which has no float16 product with a float32 sum."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 and hardware.present().platform == "cpu" else dtype)


# Otherwise XLA moves a transposition or a reshape into the adjacent matrix product, where it costs a CPU more.
_materialise = jax.lax.optimization_barrier


def _by_head(x: jax.Array) -> jax.Array:
    """`[B, L, H, head_dim]` to `[B H, L, head_dim]`, materialised: a CPU's products of 4-D arrays use one thread."""
    return _materialise(jnp.moveaxis(x, 2, 1).reshape(x.shape[0] * x.shape[2], x.shape[1], x.shape[3]))


def _by_token(x: jax.Array, heads: int) -> jax.Array:
    """Undoes `_by_head`."""
    return jnp.moveaxis(x.reshape(len(x) // heads, heads, *x.shape[1:]), 1, 2)


def _product(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`a @ b` of stacks of matrices, multiplied in `dtype` and summed in float32."""
    wide = _operand_type(dtype)
    return jnp.matmul(a.astype(wide), b.astype(wide), preferred_element_type=jnp.float32)


def _transposed(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Attention of q, k, v `[N, L, head_dim]`, whose gradient recomputes the weights `[N, L, L]` (Dao et al., 2022).

    It keeps only q, k, v, the result and one number per token. The weights are normalised after the product with v, which
    is smaller than they are.
    """
    return _attention_forward(q, k, v, causal)[0]


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, tuple]:
    length, head_dim = q.shape[1:]
    scores = _product(q, _transposed(k), q.dtype) * head_dim**-0.5
    if causal:
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_product(weights, v, v.dtype) / total).astype(v.dtype)
    return out, (q, k, v, out, top + jnp.log(total))


def _attention_backward(causal: bool, residuals: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Uses transposed weights `[N, keys, queries]`: a CPU's fast product needs its first operand untransposed."""
    q, k, v, out, log_normaliser = residuals
    length, head_dim = q.shape[1:]
    scale = head_dim**-0.5
    weights = jnp.exp(_product(k, _transposed(q), q.dtype) * scale - _transposed(log_normaliser))
    if causal:
        weights = jnp.where(~jnp.tri(length, k=-1, dtype=bool), weights, 0.0)
    # The softmax subtracts the weighted mean of the weights' gradients, which equals sum(out * cotangent).
    mean = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = weights * (_product(v, _transposed(cotangent), v.dtype) - _transposed(mean)) * scale
    d_q = _transposed(_materialise(_product(_materialise(_transposed(k)), d_scores, k.dtype)))
    d_k = _product(d_scores, q, q.dtype)
    d_v = _product(weights, cotangent, v.dtype)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_attention.defvjp(_attention_forward, _attention_backward)
