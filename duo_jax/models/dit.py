"""The diffusion transformer (Peebles & Xie, 2023) in the form that Duo, MDLM and SEDD share.

Token (or relaxed token) embeddings pass through blocks that the noise level `sigma = -log(alpha_t)` modulates: it shifts and
scales their LayerNorms and gates their branches. `models.head` maps the result to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from duo_jax.models import attention, head, layers

TIME_FEATURES = 256

# The past keys and values of one block, each [B, T, H, head_dim].
Cache = tuple[jax.Array, ...]

_KEPT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "blocks": None}

# As in the reference, PyTorch's default: uniform in +-1/sqrt(fan_in), for kernels, biases and embedding rows.
_uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def _embedding_init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    bound = shape[1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def time_features(sigma: jax.Array, size: int = TIME_FEATURES, max_period: float = 10_000.0) -> jax.Array:
    """Returns sinusoidal features `[B, size]` of `sigma`, `[B]` or `[B, 1]`: cosines, then sines."""
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
    angle = jnp.asarray(sigma, jnp.float32).reshape(-1, 1) * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _identity(x: jax.Array) -> jax.Array:
    return x


def by_token(x: jax.Array) -> jax.Array:
    """Returns `x [B, L, D]` as `[B L, D]`: on a CPU a kernel's gradient summed over two axes takes twice as long."""
    return x.reshape(-1, x.shape[-1])


class LayerNorm(nn.Module):
    """`layers.modulated_norm` with its weight as a parameter."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None) -> jax.Array:
        """Normalises the last axis of `x [B, L, D]`."""
        return layers.modulated_norm(x, Weight(name="norm")(x.shape[-1]), scale, shift, self.dtype)


class Weight(nn.Module):
    """The weight of a LayerNorm, initially 1."""

    @nn.compact
    def __call__(self, dim: int) -> jax.Array:
        """Returns `[dim]`."""
        return self.param("scale", nn.initializers.ones, (dim,))


class Dense(nn.Module):
    """A linear map that returns its bias separately; the next operation adds it."""

    features: int
    use_bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Maps `[N, D]` to the product `[N, features]`, in the compute type, and the bias `[features]`."""
        kernel = self.param("kernel", _uniform_fan_in, (x.shape[-1], self.features))
        bias = self.param("bias", _uniform_bias(x.shape[-1]), (self.features,)) if self.use_bias else None
        return x.astype(self.dtype) @ kernel.astype(self.dtype), bias


class Modulation(nn.Module):
    """adaLN: `n` vectors `[B, 1, D]` from the conditioning; initially zero, so that every block starts as identity."""

    n: int
    dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, cond: jax.Array) -> list[jax.Array]:
        """Maps the conditioning `[B, cond_dim]` to the vectors."""
        dense = nn.Dense(self.n * self.dim, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="linear")
        return jnp.split(dense(cond)[:, None, :], self.n, axis=-1)


class Block(nn.Module):
    """One transformer block: attention and an MLP, each on a modulated LayerNorm and gated into the residual stream."""

    dim: int
    heads: int
    dropout: float
    causal: bool
    adaln: bool
    dtype: jnp.dtype
    attention: str
    by_rows: Callable[[jax.Array], jax.Array] = _identity

    def setup(self) -> None:
        """Creates the submodules."""
        self.norm1 = LayerNorm(self.dtype)
        self.norm2 = LayerNorm(self.dtype)
        self.qkv = Dense(3 * self.dim, False, self.dtype)
        self.attn_out = Dense(self.dim, False, self.dtype)
        self.mlp_in = Dense(4 * self.dim, True, self.dtype)
        self.mlp_out = Dense(self.dim, True, self.dtype)
        if self.adaln:
            self.modulation = Modulation(6, self.dim, self.dtype)

    def __call__(
        self,
        x: jax.Array,
        cond: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        train: bool,
        lengths: jax.Array | None = None,
    ) -> jax.Array:
        """Maps the residual stream `x [B, L, D]` to the next one."""

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k, v = map(self.by_rows, (q, k, v))
            return attention.attend(q, k, v, causal=self.causal, requested=self.attention, lengths=lengths)

        return self._update(self.by_rows(x), cond, cos, sin, train, attend)

    def next(
        self, x: jax.Array, cache: Cache, position: jax.Array, cos: jax.Array, sin: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Maps `x [B, 1, D]` at one position, given the cache of its past; returns also the cache with this position."""
        grown: Cache = ()

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal grown
            grown = tuple(
                jax.lax.dynamic_update_slice_in_dim(c, new, position, 1) for c, new in zip(cache, (k, v), strict=True)
            )
            return attention.attend_to_past(q, *grown, position)

        x = self._update(x, None, cos, sin, False, attend)
        return x, grown

    def _update(
        self,
        x: jax.Array,
        cond: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        train: bool,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """The block with any function `attend(q, k, v)` of arrays `[B, L, H, head_dim]`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond) if self.adaln else (None,) * 6

        qkv, _ = self.qkv(by_token(self.norm1(x, scale1, shift1)))
        y = attend(*layers.heads_of(qkv.reshape(*x.shape[:2], -1), cos, sin))
        x = self._add(x, *self.attn_out(by_token(y.reshape(x.shape))), gate1, train)

        y = layers.gelu(*self.mlp_in(by_token(self.norm2(x, scale2, shift2))))
        return self._add(x, *self.mlp_out(y), gate2, train)

    def _add(
        self, x: jax.Array, y: jax.Array, bias: jax.Array | None, gate: jax.Array | None, train: bool
    ) -> jax.Array:
        """Adds a branch, whose last matrix product is `y [B L, D]`, to the residual stream `x [B, L, D]`."""
        kept, share = None, 1.0
        if train and self.dropout:
            kept, share = layers.dropout_mask(self.make_rng("dropout"), self.dropout, x.shape)
        return layers.gated_sum(x, y.reshape(x.shape), bias, gate, kept, share)


class Head(nn.Module):
    """The final linear map to the vocabulary, `models.head.logits`; initially zero."""

    vocab_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps `[B, L, D]` to logits `[B, L, K]`, float32."""
        kernel = self.param("kernel", nn.initializers.zeros, (hidden.shape[-1], self.vocab_size))
        bias = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        return head.logits(hidden, {"kernel": kernel, "bias": bias}, self.dtype)


class DiT(nn.Module):
    """The network: maps noisy tokens and their noise level to logits over the vocabulary.

    Attributes:
        vocab_size: K, special ids included.
        dim: width D of the residual stream.
        blocks: number of transformer blocks.
        heads: attention heads; D / heads must be even (rotary positions rotate pairs).
        cond_dim: width of the noise-level conditioning.
        dropout: on both residual branches of a block, in training.
        causal: True for the autoregressive baseline, where a position sees only itself and those before it.
        adaln: whether the noise level modulates the blocks; False for the autoregressive baseline.
        dtype: compute type of the blocks. Parameters, LayerNorms, the residual stream and logits are float32.
        attention: `auto`, `xla` or `cudnn`.
        remat: what the backward pass recomputes: `none`, `dots` (everything except matrix products) or `blocks` (everything
            except the blocks' inputs).
        scan: whether the blocks are one scanned loop, which compiles in the time of one block, or unrolled.
        by_rows: splits the rows of `[B, ...]` over devices; applied to the inputs of each block and of its attention.
    """

    vocab_size: int
    dim: int
    blocks: int
    heads: int
    cond_dim: int = 128
    dropout: float = 0.0
    causal: bool = False
    adaln: bool = True
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"
    remat: str = "none"
    scan: bool = False
    by_rows: Callable[[jax.Array], jax.Array] = _identity

    def setup(self) -> None:
        """Creates the submodules."""

        def dense(features: int, fan_in: int) -> nn.Dense:
            return nn.Dense(features, kernel_init=_uniform_fan_in, bias_init=_uniform_bias(fan_in))

        self.embed = nn.Embed(self.vocab_size, self.dim, embedding_init=_embedding_init)
        self.layers = [
            Block(
                self.dim,
                self.heads,
                self.dropout,
                self.causal,
                self.adaln,
                self.dtype,
                self.attention,
                self.by_rows,
                name=f"block_{i}",
            )
            for i in range(self.blocks)
        ]
        self.norm_final = LayerNorm()
        if self.adaln:
            self.time_in = dense(self.cond_dim, TIME_FEATURES)
            self.time_out = dense(self.cond_dim, self.cond_dim)
            self.modulation_final = Modulation(2, self.dim, self.dtype)
        self.head = Head(self.vocab_size, self.dtype)

    def embedded(self, inputs: jax.Array, weights: jax.Array | None = None) -> jax.Array:
        """Returns the initial residual stream `[B, L, D]`, float32.

        Args:
            inputs: token ids `[B, L]`; or relaxed logits `[B, L, K]` (float), whose softmax mixes embedding rows; or ids
                `[B, L, k]` with `weights`.
            weights: `[B, L, k]`, the weight of each of the k embedding rows.
        """
        if weights is not None:
            return jnp.einsum("blk,blkd->bld", weights.astype(jnp.float32), self.embed(inputs))
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            return jax.nn.softmax(inputs.astype(jnp.float32), axis=-1) @ self.embed.embedding
        return self.embed(inputs)

    def hidden(
        self, x: jax.Array, sigma: jax.Array | None, *, train: bool = False, lengths: jax.Array | None = None
    ) -> jax.Array:
        """Returns the input of the vocabulary head, `[B, L, D]` float32.

        Args:
            x: the result of `embedded`.
            sigma: noise level -log(alpha_t), `[B]` or one for all rows; None without adaLN.
            train: whether dropout acts; it then needs an rng named `dropout`.
            lengths: `[B]`, the number of tokens in each row; no token sees what follows them. None means all L.
        """
        cond = None
        if self.adaln:
            cond = nn.silu(self.time_out(nn.silu(self.time_in(time_features(sigma)))))
        cos, sin = attention.rotary_angles(x.shape[1], self.dim // self.heads)
        if self.is_initializing():
            for layer in self.layers:
                x = layer(x, cond, cos, sin, train)
        else:
            dropout_key = self.make_rng("dropout") if train and self.dropout else None
            x = self._through_blocks(x, cond, cos, sin, dropout_key, lengths)
        shift, scale = self.modulation_final(cond) if self.adaln else (None, None)
        return self.norm_final(x, scale, shift)

    def _through_blocks(
        self,
        x: jax.Array,
        cond: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        dropout_key: jax.Array | None,
        lengths: jax.Array | None,
    ) -> jax.Array:
        """Applies all blocks; `scan` and `remat` do not change the numbers."""
        block = self.layers[0].clone(parent=None, name=None)

        def apply(x: jax.Array, weights: dict, i: jax.typing.ArrayLike) -> jax.Array:
            rngs = None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, i)}
            return block.apply({"params": weights}, x, cond, cos, sin, rngs is not None, lengths, rngs=rngs)

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=_KEPT[self.remat])
        weights = [layer.variables["params"] for layer in self.layers]
        if not self.scan:
            for i, block_weights in enumerate(weights):
                x = apply(x, block_weights, i)
            return x
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
        return jax.lax.scan(lambda x, at: (apply(x, *at), None), x, (stacked, jnp.arange(self.blocks)))[0]

    def empty_cache(self, batch: int, length: int) -> tuple[Cache, ...]:
        """Returns a cache for the keys and values of `length` positions, one pair per block; needs no parameters."""
        shape = (batch, length, self.heads, self.dim // self.heads)
        return tuple((jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.blocks))

    def next_hidden(
        self, inputs: jax.Array, cache: tuple[Cache, ...], position: jax.Array
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Returns `hidden` at one position, `[B, 1, D]`, from the cache of those before it, and the cache with this one.

        Only for a causal network without adaLN. The result equals that of `hidden` for the whole text, at the cost of one
        position.

        Args:
            inputs: token ids `[B, 1]`.
            cache: see `empty_cache`; filled up to the position.
            position: a scalar.
        """
        length = cache[0][0].shape[1]
        angles = attention.rotary_angles(length, self.dim // self.heads)
        cos, sin = (jax.lax.dynamic_slice_in_dim(angle, position, 1) for angle in angles)
        x, grown = self.embedded(inputs), []
        for layer, past in zip(self.layers, cache, strict=True):
            x, past = layer.next(x, past, position, cos, sin)
            grown.append(past)
        return self.norm_final(x), tuple(grown)

    def __call__(
        self,
        inputs: jax.Array,
        sigma: jax.Array | None = None,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Returns all logits `[B, L, K]`, float32; see `embedded` and `hidden` for the arguments."""
        return self.head(self.hidden(self.embedded(inputs, weights), sigma, train=train))
