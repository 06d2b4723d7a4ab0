"""What a trained network is: its sizes, its weights, and the denoiser that losses and samplers call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from duo_jax.errors import UserError
from duo_jax.models import head
from duo_jax.models.dit import DiT

# predict(inputs, sigma [B], visitor, *per_token) -> visitor(logits [B, L, K], *per_token), possibly chunk by chunk.
Weights = dict[str, Any]
Visitor = Callable[..., Any]
Predict = Callable[..., Any]

# Width, blocks, heads, conditioning width. `nano` is what two CPU cores can teach in minutes.
SIZES = {
    "nano": (128, 4, 4, 64),
    "tiny": (256, 8, 8, 128),
    "small": (768, 12, 12, 128),
    "medium": (1024, 24, 16, 128),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """All that is needed to rebuild a network but its weights; hashable, so that it can be static under `jax.jit`."""

    algo: str
    vocab_size: int
    mask_id: int
    length: int
    dim: int
    blocks: int
    heads: int
    cond_dim: int
    dropout: float
    schedule: str = "log_linear"
    eps: float = 1e-3
    eps_t: float = 1e-3
    d3pm_steps: int = 1000
    precision: str = "auto"
    attention: str = "auto"
    head_mib: int = 256

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, mask_id: int | None = None) -> Network:
        """Returns the network a config describes.

        Args:
            config: all of it.
            vocab_size: K, the tokenizer's, special ids included.
            mask_id: the tokenizer's id that absorbing-state algorithms mask with; the last one if None.

        Raises:
            UserError: an unknown size, or a width that the heads do not divide.
        """
        model = config.model
        if model.size not in SIZES:
            raise UserError(f"config.model.size is {model.size!r}; choose one of {', '.join(SIZES)}.")
        chosen = (model.dim, model.blocks, model.heads, model.cond_dim)
        dim, blocks, heads, cond_dim = (
            given if given is not None else usual for given, usual in zip(chosen, SIZES[model.size], strict=True)
        )
        for name, value in (("dim", dim), ("blocks", blocks), ("heads", heads), ("cond_dim", cond_dim)):
            if value < 1:
                raise UserError(f"config.model.{name} is {value}; it must be at least 1.")
        if dim % (2 * heads):
            raise UserError(
                f"config.model.dim = {dim} must be a multiple of twice config.model.heads = {heads}: rotary positions turn "
                "pairs of features within a head."
            )
        return cls(
            algo=config.algo.name,
            vocab_size=vocab_size,
            mask_id=vocab_size - 1 if mask_id is None else mask_id,
            length=model.length,
            dim=dim,
            blocks=blocks,
            heads=heads,
            cond_dim=cond_dim,
            dropout=model.dropout,
            schedule=config.algo.schedule,
            eps=config.algo.eps,
            eps_t=config.algo.eps_t,
            d3pm_steps=config.algo.d3pm_steps,
            precision=config.precision,
            attention=model.attention,
            head_mib=model.head_mib,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The compute type on the default device."""
        return compute_dtype(self.precision)

    @property
    def module(self) -> DiT:
        """The Flax module; the autoregressive baseline is causal and knows no noise level."""
        autoregressive = self.algo == "ar"
        return DiT(
            vocab_size=self.vocab_size,
            dim=self.dim,
            blocks=self.blocks,
            heads=self.heads,
            cond_dim=self.cond_dim,
            dropout=self.dropout,
            causal=autoregressive,
            adaln=not autoregressive,
            dtype=self.dtype,
            attention=self.attention,
        )

    def init(self, key: jax.Array) -> Weights:
        """Returns fresh float32 weights."""
        return self.module.init(key, jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,)))["params"]

    def embed(self, weights: Weights, inputs: jax.Array, mix: jax.Array | None = None) -> jax.Array:
        """Returns `DiT.embedded`, `[B, L, D]`."""
        return self.module.apply({"params": weights}, inputs, mix, method=DiT.embedded)

    def hidden(
        self, weights: Weights, x: jax.Array, sigma: jax.Array | None, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Returns `DiT.hidden` of the embedded `x [B, L, D]`; a `dropout_key` makes dropout act, as in training."""
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None
        return self.module.apply({"params": weights}, x, sigma, train=train, rngs=rngs, method=DiT.hidden)

    def logits(self, weights: Weights, hidden: jax.Array) -> jax.Array:
        """Returns logits `[..., K]` float32 of `hidden [..., D]`."""
        return head.logits(hidden, weights["head"], self.dtype)

    def chunk(self, batch: int, shards: int, *, networks: int = 1) -> int:
        """Returns the chunk for `head.in_chunks`, for a batch over `shards` devices and so many networks' logits."""
        return head.chunk_length(networks * -(-batch // shards), self.length, self.vocab_size, self.head_mib)

    def predict(self, weights: Weights, *, dropout_key: jax.Array | None = None, shards: int = 1) -> Predict:
        """Returns the denoiser as a function `predict(inputs, sigma, visitor, *per_token)`.

        `inputs` are token ids `[B, L]` or an embedded `[B, L, D]` (float); `visitor(logits [B, l, K], *per_token
        [B, l, ...])` says what is wanted of each token's logits. It is called on chunks of the length, so the logits of a
        whole batch never exist at once.

        Args:
            weights: the network's parameters.
            dropout_key: makes dropout act, as in training.
            shards: how many devices the batch is split over, for the size of a chunk.
        """

        def predict(inputs: jax.Array, sigma: jax.Array | None, visitor: Visitor, *per_token: Any) -> Any:
            x = inputs if jnp.issubdtype(inputs.dtype, jnp.floating) else self.embed(weights, inputs)
            hidden = self.hidden(weights, x, sigma, dropout_key)
            return head.in_chunks(
                lambda hidden, *rest: visitor(self.logits(weights, hidden), *rest),
                hidden,
                *per_token,
                chunk=self.chunk(x.shape[0], shards),
            )

        return predict


@struct.dataclass
class Params:
    """A network with its weights, as `duo_jax.load` returns it: a pytree whose static part tells how to use it.

    Attributes:
        weights: the parameters, a nested dict of float32 arrays.
        network: the sizes and settings, static.
        tokenizer: a name (`gpt2`) or the folder where the tokenizer is saved, static.
    """

    weights: Weights
    network: Network = struct.field(pytree_node=False)
    tokenizer: str = struct.field(pytree_node=False)


def compute_dtype(precision: str) -> jnp.dtype:
    """Returns the compute type of the blocks.

    `auto` is bfloat16 where the matrix units know it (TPU, NVIDIA Ampere and newer), float32 elsewhere: a T4 emulates
    bfloat16 slowly, and so does a CPU.
    """
    if precision != "auto":
        return jnp.dtype(precision)
    device = jax.devices()[0]
    if device.platform == "tpu" or float(getattr(device, "compute_capability", 0) or 0) >= 8:
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float32)


def count(weights: Weights) -> int:
    """Returns the number of parameters; shapes are enough."""
    return sum(int(x.size) for x in jax.tree.leaves(weights))
