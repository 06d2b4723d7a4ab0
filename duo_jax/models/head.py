"""The vocabulary head, applied in chunks of tokens so that no `[B, L, K]` array exists at K = 50k.

A float32 `[B, L, K]` takes 6.1 GiB at B = 32, L = 1024, K = 50,258. Losses and samplers need only a few numbers per
token from it: they are functions of one chunk's logits, which are computed chunk by chunk and again in the backward pass.
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

_WHOLE = PartitionSpec()  # of what every device holds whole
# The side of the tiles that matrix units multiply.
_TILE = 128
_LARGEST_HALF = float(jnp.finfo(jnp.float16).max)
# A visitor's intermediates (softmax, log pbar and their gradients) live beside the logits themselves.
_ARRAYS_PER_CHUNK = 4


def tokens_at_once(vocab_size: int, mib: int) -> int:
    """Returns how many tokens' logits and their kin fit in `mib` MiB."""
    return max(1, mib * 2**20 // (vocab_size * 4 * _ARRAYS_PER_CHUNK))


def chunk_length(batch: int, length: int, vocab_size: int, mib: int) -> int:
    """Returns how many positions of every row one chunk may take for its logits and their kin to fit in `mib` MiB."""
    fits = max(1, tokens_at_once(vocab_size, mib) // batch)
    chunks = -(-length // min(fits, length))
    return -(-length // chunks)


def sum_of_rows(x: jax.Array) -> jax.Array:
    """Returns the sum of `x [..., K]` over all but its last axis, in float32 or wider.

    On a CPU as a product, which takes a twentieth of the time; elsewhere in the pass that makes x.
    """

    def product(x: jax.Array) -> jax.Array:
        ones = jnp.ones(x.shape[0], x.dtype)
        return jnp.matmul(ones, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    x = x.reshape(-1, x.shape[-1])
    return jax.lax.platform_dependent(x, cpu=product, default=functools.partial(jnp.sum, axis=0, dtype=wide))


def readable(head: Head, dtype: jnp.dtype) -> Head:
    """Returns a head whose kernel `[D, K']` is as products read it: in `dtype`; in half precision K' is rounded up.

    Matrix units want rows of whole tiles. With K = 50,258 each product of a chunk would first copy its operands to such.
    """
    kernel = head["kernel"]
    filling = -kernel.shape[1] % _TILE if jnp.dtype(dtype).itemsize == 2 else 0
    return {"kernel": jnp.pad(kernel.astype(dtype), ((0, 0), (0, filling))), "bias": head["bias"]}


def products(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `hidden [..., D] @ kernel [D, K']` of a `readable` head, multiplied in its type and summed in float32."""
    return jnp.matmul(hidden.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)


def of_products(products: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the logits `[..., K]` that `products [..., K']` are but for the bias `[K]`."""
    return products[..., : bias.shape[0]] + bias


def readable_logits(hidden: jax.Array, head: Head) -> jax.Array:
    """Returns the logits `[..., K]` of a `readable` head."""
    return of_products(products(hidden, head["kernel"]), head["bias"])


def products_gradient(
    hidden: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients in `hidden`, in a `readable` kernel, and of the rows' sum, from that in `products`: float32.

    The products are in the kernel's type: left to itself, a float32 cotangent would draw them to float32, at half the speed.
    The rows' sum is of what was rounded to that type too, so that nothing of the vocabulary's size is held in float32.
    """
    if kernel.dtype == jnp.float16:  # beyond its range lies infinity, which no loss scale would cure
        cotangent = jnp.clip(cotangent, -_LARGEST_HALF, _LARGEST_HALF)
    cotangent = cotangent.astype(kernel.dtype)
    rows = tuple(range(hidden.ndim - 1))
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    d_hidden = product(cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ())))
    d_kernel = product(hidden.astype(kernel.dtype), cotangent, ((rows, rows), ((), ())))
    return d_hidden, d_kernel, sum_of_rows(cotangent)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logits(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return of_products(products(hidden, kernel.astype(dtype)), bias)


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
    """Returns a `readable` head turned around, for the many products of `logits_of_transposed`."""
    reader = readable(head, dtype)
    return {"kernel": reader["kernel"].T, "bias": reader["bias"]}


def logits_of_transposed(hidden: jax.Array, head: Transposed) -> jax.Array:
    """Returns what `logits` does: 8% sooner on a CPU, and a half-precision copy of the head is made once for all."""
    kernel = head["kernel"]
    contracted = (((hidden.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(hidden.astype(kernel.dtype), kernel, contracted, preferred_element_type=jnp.float32)
    return of_products(product, head["bias"])


def in_chunks(fn: Callable[..., Any], *per_token: Any, chunk: int) -> Any:
    """Returns `fn(*per_token)` by calling it on `chunk` positions of every row at a time, again in the backward pass.

    Chunks run along the length, so a batch that is split over devices stays split.

    Args:
        fn: maps pytrees of `[B, l, ...]` to a pytree of `[B, l, ...]`, each token by itself.
        *per_token: pytrees of `[B, L, ...]`.
        chunk: l; see `chunk_length`.
    """
    length = jax.tree.leaves(per_token)[0].shape[1]
    if length <= chunk:
        return fn(*per_token)
    out = jax.lax.map(jax.checkpoint(lambda args: fn(*args)), _cut(per_token, chunk))
    return _join(out, length)


def of_some(fn: Callable[..., Any], which: jax.Array, *per_token: Any, chunk: int) -> Any:
    """Returns `fn(*per_token)` at the tokens `which`, and anything elsewhere, at the cost of these tokens alone.

    They are gathered and visited `chunk` at a time until there are none left.
    There is no gradient.

    Args:
        fn: maps pytrees of `[l, ...]` to a pytree of `[l, ...]`, each token by itself.
        which: bool `[B, L]`.
        *per_token: pytrees of `[B, L, ...]`.
        chunk: l.
    """
    tokens, count = which.size, jnp.sum(which)
    chunk = min(chunk, tokens)
    flat = jax.tree.map(lambda x: x.reshape(tokens, *x.shape[2:]), per_token)
    asked_first = jnp.argsort(~which.reshape(-1), stable=True)
    order = jnp.append(asked_first, jnp.full(chunk, tokens, asked_first.dtype))  # beyond the end: left out

    def visit(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        done, out = state
        rows = jax.lax.dynamic_slice_in_dim(order, done, chunk)
        found = fn(*jax.tree.map(lambda x: x[jnp.minimum(rows, tokens - 1)], flat))
        return done + chunk, jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), out, found)

    shapes = jax.eval_shape(fn, *jax.tree.map(lambda x: x[:chunk], flat))
    out = jax.tree.map(lambda x: jnp.zeros((tokens, *x.shape[1:]), x.dtype), shapes)
    _, out = jax.lax.while_loop(lambda state: state[0] < count, visit, (jnp.zeros((), count.dtype), out))
    return jax.tree.map(lambda x: x.reshape(*which.shape, *x.shape[1:]), out)


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
    """Of what is split by rows over all of a mesh."""
    return PartitionSpec(mesh.axis_names)


def on_rows(fn: Callable[..., Any], mesh: Mesh | None, *, whole: int, rows: int) -> Callable[..., Any]:
    """Returns `fn` run by each device on its own rows, so that a gradient is summed over the devices once, at the end.

    Args:
        fn: takes `whole` arguments that every device sees whole and `rows` that are split by rows, as its results are.
        mesh: the devices; None for one, which changes nothing.
        whole: see `fn`.
        rows: see `fn`.
    """
    if mesh is None:
        return fn
    specs = (_WHOLE,) * whole + (_rows(mesh),) * rows
    return jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=_rows(mesh), check_vma=False)


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

    Where a gradient is wanted it is taken along with the value, chunk by chunk: a sum's gradient needs nothing from what
    comes after it, so each chunk's logits are computed once and gone, and not again in the backward pass. On several
    devices each sums its own rows, and the head's gradient is summed over the devices once, not once a chunk.

    Args:
        fn: maps `[B, l, K]` logits and `[B, l, ...]` to `[B, l]`, each token by itself. No gradient flows to what it is
            given beside the logits.
        head: `kernel [D, K]` and `bias [K]`.
        hidden: `[B, L, D]`.
        weight: `[B, L]`; a token of weight 0 counts nothing, even where `fn` is infinite.
        per_token: pytrees of `[B, L, ...]`.
        constants: pytrees that every token sees whole.
        chunk: l; see `chunk_length`.
        dtype: of the products.
        mesh: the devices over which the rows are split; None for one device.
    """
    # What fn must not close over are traced arrays; hence the arguments.
    rest = jax.lax.stop_gradient((weight, per_token, constants))
    return _weighted_sum(head, hidden, rest, _Pass(fn, chunk, jnp.dtype(dtype), mesh))


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One visit to all chunks; static."""

    fn: Callable[..., jax.Array]
    chunk: int
    dtype: jnp.dtype
    mesh: Mesh | None

    def _visit(
        self, products: jax.Array, bias: jax.Array, weight: jax.Array, per_token: tuple, constants: tuple
    ) -> jax.Array:
        out = self.fn(of_products(products, bias), *per_token, *constants)
        return jnp.sum(jnp.where(weight != 0, weight * out, 0.0))

    def value(self, head: Head, hidden: jax.Array, rest: tuple) -> jax.Array:
        """The sum alone."""
        weight, per_token, constants = rest
        reader = readable(head, self.dtype)

        def visit(total: jax.Array, piece: tuple) -> tuple[jax.Array, None]:
            hidden, weight, per_token, counts = piece
            found = products(hidden, reader["kernel"])
            return total + self._visit(found, reader["bias"], weight * counts, per_token, constants), None

        total, _ = jax.lax.scan(visit, jnp.zeros(()), self._pieces(hidden, weight, per_token))
        return self._over_devices(total)

    def value_and_grad(self, head: Head, hidden: jax.Array, rest: tuple) -> tuple[jax.Array, Head, jax.Array]:
        """The sum and its gradient in `head` and `hidden`."""
        weight, per_token, constants = rest
        reader = readable(head, self.dtype)
        kernel, bias = reader["kernel"], reader["bias"]

        def visit(carry: tuple, piece: tuple) -> tuple[tuple, jax.Array]:
            hidden, weight, per_token, counts = piece
            value, cotangent = jax.value_and_grad(self._visit)(
                products(hidden, kernel), bias, weight * counts, per_token, constants
            )
            d_hidden, *d_head = products_gradient(hidden, kernel, cotangent)
            return jax.tree.map(jnp.add, carry, (value, *d_head)), d_hidden

        start = jnp.zeros(()), jnp.zeros(kernel.shape), jnp.zeros(kernel.shape[1])
        summed, d_hidden = jax.lax.scan(visit, start, self._pieces(hidden, weight, per_token))
        value, d_kernel, d_bias = self._over_devices(summed)
        vocab_size = bias.shape[0]
        d_head = {"kernel": d_kernel[:, :vocab_size], "bias": d_bias[:vocab_size]}
        return value, d_head, _join(d_hidden, hidden.shape[1])

    def _pieces(self, hidden: jax.Array, weight: jax.Array, per_token: tuple) -> tuple:
        # The copies that fill up the last chunk do not count.
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
def _weighted_sum(head: Head, hidden: jax.Array, rest: tuple, plan: _Pass) -> jax.Array:
    return plan.on_devices(plan.value, _WHOLE)(head, hidden, rest)


def _weighted_sum_forward(head: Head, hidden: jax.Array, rest: tuple, plan: _Pass) -> tuple[jax.Array, tuple]:
    out = (_WHOLE, _WHOLE, plan.mesh and _rows(plan.mesh))
    value, d_head, d_hidden = plan.on_devices(plan.value_and_grad, out)(head, hidden, rest)
    return value, (d_head, d_hidden)


def _weighted_sum_backward(plan: _Pass, gradient: tuple, cotangent: jax.Array) -> tuple:
    d_head, d_hidden = jax.tree.map(lambda g: g * cotangent, gradient)
    return d_head, d_hidden, None


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)
