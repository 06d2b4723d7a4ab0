"""Pretrained autoregressive language models, GPT-2 and Llama, as judges of text: tokens in, nats per token out."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax.diffusion import categorical
from duo_jax.models import attention, head

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """The settings of a language model that its weights do not determine; static.

    Attributes:
        family: `gpt2` or `llama`.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; in GPT-2 equal to it.
        eps: added to the variance in the normalisations.
        context: the longest text, in tokens.
        rope_base: base of Llama's rotary frequencies.
        head_mib: MiB that one chunk of logits may take.
    """

    family: str
    heads: int
    kv_heads: int
    eps: float
    context: int
    rope_base: float = 10_000.0
    head_mib: int = 128


def _layer_norm(x: jax.Array, norm: Weights, eps: float) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * norm["scale"] + norm["bias"]


def _rms_norm(x: jax.Array, norm: Weights, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * norm["scale"]


def _dense(x: jax.Array, layer: Weights) -> jax.Array:
    y = x @ layer["kernel"]
    return y + layer["bias"] if "bias" in layer else y


def _split_heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    out = attention.attend(q, k, v, causal=True, requested="xla")
    return out.reshape(*out.shape[:2], -1)


def _gpt2_block(spec: Spec, x: jax.Array, block: Weights) -> jax.Array:
    qkv = _dense(_layer_norm(x, block["norm1"], spec.eps), block["qkv"])
    q, k, v = (_split_heads(part, spec.heads) for part in jnp.split(qkv, 3, axis=-1))
    x = x + _dense(_attend(q, k, v), block["out"])
    y = jax.nn.gelu(_dense(_layer_norm(x, block["norm2"], spec.eps), block["mlp_in"]), approximate=True)
    return x + _dense(y, block["mlp_out"])


def _llama_block(spec: Spec, x: jax.Array, block: Weights) -> jax.Array:
    y = _rms_norm(x, block["norm1"], spec.eps)
    q = _split_heads(_dense(y, block["q"]), spec.heads)
    k, v = (_split_heads(_dense(y, block[name]), spec.kv_heads) for name in ("k", "v"))
    cos, sin = attention.rotary_angles(x.shape[1], q.shape[-1], spec.rope_base)
    x = x + _dense(_attend(attention.rotate(q, cos, sin), attention.rotate(k, cos, sin), v), block["out"])
    y = _rms_norm(x, block["norm2"], spec.eps)
    return x + _dense(jax.nn.silu(_dense(y, block["gate"])) * _dense(y, block["up"]), block["down"])


def hidden(spec: Spec, weights: Weights, tokens: jax.Array) -> jax.Array:
    """Returns the last hidden states `[B, L, D]`, float32, of tokens `[B, L]`.

    Args:
        spec: the model's settings.
        weights: `embed [K, D]`, `blocks` (kernels `[in, out]`, stacked over the blocks), `norm`, and GPT-2's `positions`.
        tokens: int; a position depends only on itself and those before it, so padding belongs at the end.
    """
    x = weights["embed"][tokens]
    if spec.family == "gpt2":
        x = x + weights["positions"][: tokens.shape[1]]
    block = {"gpt2": _gpt2_block, "llama": _llama_block}[spec.family]
    x, _ = jax.lax.scan(lambda x, w: (block(spec, x, w), None), x, weights["blocks"])
    return (_layer_norm if spec.family == "gpt2" else _rms_norm)(x, weights["norm"], spec.eps)


@functools.partial(jax.jit, static_argnames="spec")
def nll(weights: Weights, tokens: jax.Array, *, spec: Spec) -> jax.Array:
    """Returns -log p(token | those before it) in nats, `[B, L-1]`, for all tokens `[B, L]` except the first."""
    batch, length = tokens.shape
    if length < 2:
        return jnp.zeros((batch, 0))
    kernel = weights.get("head", weights["embed"]).T
    embedded = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])}

    def token_nll(x: jax.Array, target: jax.Array) -> jax.Array:
        return categorical.nll(head.logits(x, embedded, jnp.float32), target)

    chunk = head.chunk_length(batch, length - 1, kernel.shape[1], spec.head_mib)
    # By default accelerators round the factors of float32 products, and the result would depend on the device.
    with jax.default_matmul_precision("highest"):
        return head.in_chunks(token_nll, hidden(spec, weights, tokens)[:, :-1], tokens[:, 1:], chunk=chunk)
