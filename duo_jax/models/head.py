"""The vocabulary head, applied in chunks of tokens so that no `[B, L, K]` array exists at K = 50k.

A float32 `[B, L, K]` takes 6.1 GiB at B = 32, L = 1024, K = 50,258. Losses and samplers need only a few numbers per
token from it, so they are written as functions of one chunk's logits and applied to one chunk after another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

Head = dict[str, jax.Array]  # kernel [D, K] and bias [K]
Transposed = dict[str, jax.Array]  # kernel [K', D], in the compute type, and bias [K]

_WHOLE = PartitionSpec()  # for arrays that every device holds whole
# Matrix units multiply square tiles with this side.
_TILE = 128
_LARGEST_HALF = float(jnp.finfo(jnp.float16).max)
# A chunk holds the logits and a loss's intermediates of the same size (softmax, log pbar and their gradients).
_ARRAYS_PER_CHUNK = 4


def tokens_at_once(vocab_size: int, mib: int) -> int:
    """Returns how many tokens' logits, with a loss's intermediates, fit in `mib` MiB."""
    return max(1, mib * 2**20 // (vocab_size * 4 * _ARRAYS_PER_CHUNK))


def chunk_length(batch: int, length: int, vocab_size: int, mib: int) -> int:
    """Returns how many positions of every row form one chunk, so that it fits in `mib` MiB as in `tokens_at_once`."""
    fits = max(1, tokens_at_once(vocab_size, mib) // batch)
    chunks = -(-length // min(fits, length))
    return -(-length // chunks)


def sum_of_rows(x: jax.Array) -> jax.Array:
    """Returns the sum of `x [..., K]` over all but its last axis, in float32 or wider.

    A CPU computes it as a matrix product, in a twentieth of the time; elsewhere it fuses with the pass that computes x.
    """

    def product(x: jax.Array) -> jax.Array:
        ones = jnp.ones(x.shape[0], x.dtype)
        return jnp.matmul(ones, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = x.reshape(-1, x.shape[-1])
    return jax.lax.platform_dependent(x, cpu=product, default=functools.partial(jnp.sum, axis=0, dtype=wide))


def padded_head(head: Head, dtype: jnp.dtype) -> Head:
    """Returns the head with its kernel `[D, K']` cast to `dtype` and, in half precision, padded to whole tiles.

    Matrix units need rows of whole tiles. With K = 50,258 each product of a chunk would first copy its operands to pad them.
    """
    kernel = head["kernel"]
    filling = -kernel.shape[1] % _TILE if jnp.dtype(dtype).itemsize == 2 else 0
    return {"kernel": jnp.pad(kernel.astype(dtype), ((0, 0), (0, filling))), "bias": head["bias"]}


def products(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `hidden [..., D] @ kernel [D, K']` of a `padded_head`, multiplied in its type and summed in float32."""
    return jnp.matmul(hidden.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


def add_bias(products: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the logits `[..., K]`: `products [..., K']` without the padding, plus the bias `[K]`."""
    return products[..., : bias.shape[0]] + bias


def padded_head_logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Returns the logits `[..., K]` of a `padded_head` for `hidden [..., D]`."""
    return add_bias(products(hidden, head["kernel"]), head["bias"])


def products_gradient(
    hidden: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients, in float32, with respect to `hidden`, the `padded_head`'s kernel and its (padded) bias.

    `cotangent [..., K']` is that of `products`. It is cast to the kernel's type, because a float32 cotangent would make the
    products float32, at half the speed. The bias's gradient sums the same rounded values, so that no float32 array of the
    vocabulary's size is stored.
    """
    if kernel.dtype == jnp.float16:  # a value beyond its range would become infinite, which no loss scale can repair
        cotangent = jnp.clip(cotangent, -_LARGEST_HALF, _LARGEST_HALF)
    cotangent = cotangent.astype(kernel.dtype)
    rows = tuple(range(hidden.ndim - 1))
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    d_hidden = product(cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ())))
    d_kernel = product(hidden.astype(kernel.dtype), cotangent, ((rows, rows), ((), ())))
    return d_hidden, d_kernel, sum_of_rows(cotangent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logits(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return add_bias(products(hidden, kernel.astype(dtype)), bias)


def _logits_forward(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple]:
    return _logits(hidden, kernel, bias, dtype), (hidden, kernel)


def _logits_backward(
    dtype: jnp.dtype, residuals: tuple, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    hidden, kernel = residuals
    d_hidden, d_kernel, d_bias = products_gradient(hidden, kernel.astype(dtype), cotangent)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype), d_bias


_logits.defvjp(_logits_forward, _logits_backward)


def logits(hidden: jax.Array, head: Head, dtype: jnp.dtype) -> jax.Array:
    """Returns `hidden [..., D] @ kernel [D, K] + bias [K]`, multiplied in `dtype` and accumulated in float32."""
    return _logits(hidden, head["kernel"], head["bias"], jnp.dtype(dtype))


def transposed(head: Head, dtype: jnp.dtype) -> Transposed:
    """Returns the `padded_head` with its kernel transposed, for many calls of `logits_of_transposed`."""
    padded = padded_head(head, dtype)
    return {"kernel": padded["kernel"].T, "bias": padded["bias"]}


def logits_of_transposed(hidden: jax.Array, head: Transposed) -> jax.Array:
    """Returns what `logits` does, 8% faster on a CPU and without casting the head to half precision in each call."""
    kernel = head["kernel"]
    contracted = (((hidden.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(hidden.astype(kernel.dtype), kernel, contracted, preferred_element_type=jnp.float32)
    return add_bias(product, head["bias"])


def in_chunks(fn: Callable[..., Any], *per_token: Any, chunk: int) -> Any:
    """Returns `fn(*per_token)`, called on `chunk` positions of every row at a time and again in the backward pass.

    Chunks are cut along the length, so a batch that is split over devices stays split.

    Args:
        fn: maps pytrees of `[B, l, ...]` to a pytree of `[B, l, ...]`, each token independently.
        *per_token: pytrees of `[B, L, ...]`.
        chunk: l; see `chunk_length`.
    """
    length = jax.tree.leaves(per_token)[0].shape[1]
    if length <= chunk:
        return fn(*per_token)
    out = jax.lax.map(jax.checkpoint(lambda args: fn(*args)), _cut(per_token, chunk))
    return _join(out, length)


def map_selected_tokens(fn: Callable[..., Any], selected: jax.Array, *per_token: Any, chunk: int) -> Any:
    """Returns `fn(*per_token)` at the selected tokens, at the cost of these tokens only; the rest is unspecified.

    The selected tokens are gathered and mapped `chunk` at a time. There is no gradient.

    Args:
        fn: maps pytrees of `[l, ...]` to a pytree of `[l, ...]`, each token independently.
        selected: bool `[B, L]`.
        *per_token: pytrees of `[B, L, ...]`.
        chunk: l.
    """
    tokens, count = selected.size, jnp.sum(selected)
    chunk = min(chunk, tokens)
    flat = jax.tree.map(lambda x: x.reshape(tokens, *x.shape[2:]), per_token)
    selected_first = jnp.argsort(~selected.reshape(-1), stable=True)
    # Indices past the end fill up the last chunk; their results are dropped.
    order = jnp.append(selected_first, jnp.full(chunk, tokens, selected_first.dtype))

    def map_chunk(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        done, out = state
        rows = jax.lax.dynamic_slice_in_dim(order, done, chunk)
        found = fn(*jax.tree.map(lambda x: x[jnp.minimum(rows, tokens - 1)], flat))
        return done + chunk, jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), out, found)

    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[:chunk], flat))
    out = jax.tree.map(lambda x: jnp.zeros((tokens, *x.shape[1:]), x.dtype), shapes)
    _, out = jax.lax.while_loop(lambda state: state[0] < count, map_chunk, (jnp.zeros((), count.dtype), out))
    return jax.tree.map(lambda x: x.reshape(*selected.shape, *x.shape[1:]), out)


def _cut(per_token: Any, chunk: int) -> Any:
    """Turns `[B, L, ...]` into `[chunks, B, chunk, ...]`; copies of the last position fill up the last chunk."""
    length = jax.tree.leaves(per_token)[0].shape[1]
    chunks = -(-length // chunk)
    source = jnp.minimum(jnp.arange(chunks * chunk), length - 1)

    def cut(x: jax.Array) -> jax.Array:
        x = x if chunks * chunk == length else x[:, source]
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, per_token)


def _join(cut: Any, length: int) -> Any:
    """Undoes `_cut`."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, cut)


def _rows(mesh: Mesh) -> PartitionSpec:
    """For arrays whose rows are split over all devices of a mesh."""
    return PartitionSpec(mesh.axis_names)


def on_rows(fn: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """Returns `fn`, run by each device on its own rows: a gradient is summed over the devices once, at the end.

    Args:
        fn: called as `fn(shared, *split)`. Every device sees the pytree `shared` whole; the rows of `split` and of the
            result are split over the devices.
        mesh: the devices; None for one device, which returns `fn` itself.
    """
    if mesh is None:
        return fn

    def run(shared: Any, *split: Any) -> Any:
        specs = (_WHOLE, *(_rows(mesh),) * len(split))
        return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=_rows(mesh), check_vma=False)(shared, *split)

    return run


def weighted_sum(
    fn: Callable[..., jax.Array],
    head: Head,
    hidden: jax.Array,
    weight: jax.Array,
    per_token: tuple = (),
    constants: tuple = (),
    *,
    chunk: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Returns the sum over tokens of `weight * fn(logits, *per_token, *constants)`, a scalar, in chunks of tokens.

    If a gradient is wanted, each chunk computes it together with its value: the gradient of a sum depends on nothing that
    comes later, so no chunk's logits need to be kept or recomputed for the backward pass. On several devices, each sums
    its own rows, and the head's gradient is summed over the devices once, not once per chunk.

    Args:
        fn: maps logits `[B, l, K]` and pytrees of `[B, l, ...]` to `[B, l]`, each token independently. It is differentiated
            with respect to the logits only.
        head: `kernel [D, K]` and `bias [K]`.
        hidden: `[B, L, D]`.
        weight: `[B, L]`; a token of weight 0 adds nothing, even where `fn` is infinite.
        per_token: pytrees of `[B, L, ...]`.
        constants: further arguments of `fn`: pytrees that are the same for all tokens.
        chunk: l; see `chunk_length`.
        dtype: compute type of the matrix products.
        mesh: the devices over which the rows are split; None for one device.
    """
    # fn must not close over traced arrays (it is a static argument of a custom_vjp), so they are passed as arguments.
    rest = jax.lax.stop_gradient((weight, per_token, constants))
    return _weighted_sum(head, hidden, rest, _ChunkedSum(fn, chunk, jnp.dtype(dtype), mesh))


@dataclasses.dataclass(frozen=True)
class _ChunkedSum:
    """The settings of `weighted_sum`, static, and its computation on one device."""

    fn: Callable[..., jax.Array]
    chunk: int
    dtype: jnp.dtype
    mesh: Mesh | None

    def _chunk_sum(
        self, products: jax.Array, bias: jax.Array, weight: jax.Array, per_token: tuple, constants: tuple
    ) -> jax.Array:
        out = self.fn(add_bias(products, bias), *per_token, *constants)
        return jnp.sum(jnp.where(weight != 0, weight * out, 0.0))

    def value(self, head: Head, hidden: jax.Array, rest: tuple) -> jax.Array:
        """The sum without its gradient."""
        weight, per_token, constants = rest
        padded = padded_head(head, self.dtype)

        def add_chunk(total: jax.Array, piece: tuple) -> tuple[jax.Array, None]:
            hidden, weight, per_token, counts = piece
            found = products(hidden, padded["kernel"])
            return total + self._chunk_sum(found, padded["bias"], weight * counts, per_token, constants), None

        total, _ = jax.lax.scan(add_chunk, jnp.zeros(()), self._pieces(hidden, weight, per_token))
        return self._over_devices(total)

    def value_and_grad(self, head: Head, hidden: jax.Array, rest: tuple) -> tuple[jax.Array, Head, jax.Array]:
        """The sum and its gradients with respect to `head` and `hidden`."""
        weight, per_token, constants = rest
        padded = padded_head(head, self.dtype)
        kernel, bias = padded["kernel"], padded["bias"]

        def add_chunk(carry: tuple, piece: tuple) -> tuple[tuple, jax.Array]:
            hidden, weight, per_token, counts = piece
            value, cotangent = jax.value_and_grad(self._chunk_sum)(
                products(hidden, kernel), bias, weight * counts, per_token, constants
            )
            d_hidden, *d_head = products_gradient(hidden, kernel, cotangent)
            return jax.tree.map(jnp.add, carry, (value, *d_head)), d_hidden

        start = jnp.zeros(()), jnp.zeros(kernel.shape), jnp.zeros(kernel.shape[1])
        summed, d_hidden = jax.lax.scan(add_chunk, start, self._pieces(hidden, weight, per_token))
        value, d_kernel, d_bias = self._over_devices(summed)
        vocab_size = bias.shape[0]
        d_head = {"kernel": d_kernel[:, :vocab_size], "bias": d_bias[:vocab_size]}
        return value, d_head, _join(d_hidden, hidden.shape[1])

    def _pieces(
        self, hidden: jax.Array, weight: jax.Array, per_token: tuple
    ) -> tuple[jax.Array, jax.Array, tuple, jax.Array]:
        """The arguments and a mask, cut into `[chunks, B, chunk, ...]`; the mask excludes the last chunk's filling."""
        length = hidden.shape[1]
        pieces = _cut((hidden, weight, per_token), self.chunk)
        chunks, batch = pieces[1].shape[:2]
        counts = (jnp.arange(chunks * self.chunk) < length).reshape(chunks, 1, self.chunk)
        return *pieces, jnp.broadcast_to(counts, (chunks, batch, self.chunk))

    def _over_devices(self, x: Any) -> Any:
        return x if self.mesh is None else jax.lax.psum(x, self.mesh.axis_names)

    def on_devices(self, method: Callable[..., Any], out: tuple | PartitionSpec) -> Callable[..., Any]:
        """Runs `method` on each device's rows."""
        if self.mesh is None:
            return method
        rows = _rows(self.mesh)
        specs = (_WHOLE, rows, (rows, rows, _WHOLE))
        return jax.shard_map(method, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _weighted_sum(head: Head, hidden: jax.Array, rest: tuple, plan: _ChunkedSum) -> jax.Array:
    return plan.on_devices(plan.value, _WHOLE)(head, hidden, rest)


def _weighted_sum_forward(head: Head, hidden: jax.Array, rest: tuple, plan: _ChunkedSum) -> tuple[jax.Array, tuple]:
    out = (_WHOLE, _WHOLE, plan.mesh and _rows(plan.mesh))
    value, d_head, d_hidden = plan.on_devices(plan.value_and_grad, out)(head, hidden, rest)
    return value, (d_head, d_hidden)


def _weighted_sum_backward(plan: _ChunkedSum, gradient: tuple, cotangent: jax.Array) -> tuple[Head, jax.Array, None]:
    d_head, d_hidden = jax.tree.map(lambda g: g * cotangent, gradient)
    return d_head, d_hidden, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
