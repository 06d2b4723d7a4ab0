"""A trained network: its sizes, its weights, and the functions that losses and samplers call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from duo_jax import hardware
from duo_jax.errors import UserError
from duo_jax.hardware import Hardware
from duo_jax.models import head
from duo_jax.models.dit import DiT

Weights = dict[str, Any]

# The noising process of each algorithm, which determines its samplers and its evaluation.
PROCESS_OF = {
    "duo": "uniform", "duo_base": "uniform", "dcd": "uniform",
    "mdlm": "absorbing", "sedd": "absorbing", "d3pm": "absorbing",
    "ar": "autoregressive",
}  # fmt: skip

# Width, blocks, heads, conditioning width. Two CPU cores can train `nano` in minutes.
SIZES = {
    "nano": (128, 4, 4, 64),
    "tiny": (256, 8, 8, 128),
    "small": (768, 12, 12, 128),
    "medium": (1024, 24, 16, 128),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """All settings that define a network apart from its weights; hashable, so that it can be static under `jax.jit`.

    Attributes:
        algo: one of `config.ALGORITHMS`; determines the process, the loss and, for `ar`, causal attention.
        vocab_size: K, special ids included.
        mask_id: the mask of `mdlm`, `sedd` and `d3pm`, an id that `ar` never predicts; no other algorithm uses it.
        length: tokens in a training row, BOS and EOS included; in sampling, the tokens that the network reads at once.
        dim: width D of the residual stream.
        blocks: number of transformer blocks.
        heads: attention heads; D / heads is even.
        cond_dim: width of the noise-level conditioning.
        dropout: the rate on the two residual branches of every block, in training.
        schedule: alpha_t: `log_linear` or `cosine`.
        eps: the schedule's eps: alpha(1) is eps if `log_linear`, 1 - cos(pi/2 eps) if `cosine`. It also limits the sigma
            that d3pm's network sees to -log(eps).
        eps_t: the smallest time t in [0, 1] that training and evaluation draw; d3pm uses its chain's times instead.
        d3pm_steps: T, the steps of D3PM's chain.
        precision: the type of the matrix products in the blocks and the head: `float32`, `bfloat16`, `float16` or `auto`,
            see `compute_dtype`.
        attention: `auto`, `xla` or `cudnn`.
        head_mib: MiB on a device for a chunk of logits and its intermediates; None: see `chunk_budget`.
        remat: what the backward pass recomputes to save memory: `none`, `dots` (everything except matrix products) or
            `blocks` (everything except the blocks' inputs).
        scan: whether the blocks are one loop, which compiles in the time of one block.
    """

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
    head_mib: int | None = None
    remat: str = "none"
    scan: bool = False

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, mask_id: int | None = None) -> Network:
        """Returns the network that a config describes.

        Args:
            config: the whole config.
            vocab_size: K of the tokenizer, special ids included.
            mask_id: the tokenizer's id of the mask in absorbing-state algorithms; the last id if None.

        Raises:
            UserError: an unknown size, a size below 1, or a width that is no multiple of twice the heads.
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
            remat=model.remat,
            scan=model.scan,
        )

    @property
    def process(self) -> str:
        """`uniform`, `absorbing` or `autoregressive`."""
        return PROCESS_OF[self.algo]

    @property
    def dtype(self) -> jnp.dtype:
        """The compute type on the target hardware."""
        return compute_dtype(self.precision)

    @property
    def head_budget(self) -> int:
        """MiB for a chunk of logits: `head_mib`, or a default for the target hardware."""
        return chunk_budget(hardware.present()) if self.head_mib is None else self.head_mib

    @property
    def module(self) -> DiT:
        """The Flax module; the autoregressive baseline is causal and has no noise level."""
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
            remat=self.remat,
            scan=self.scan,
        )

    def init(self, key: jax.Array) -> Weights:
        """Returns fresh float32 weights."""
        return self.module.init(key, jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,)))["params"]

    def embed(self, weights: Weights, inputs: jax.Array, mix: jax.Array | None = None) -> jax.Array:
        """Returns `DiT.embedded`, `[B, L, D]`."""
        return self.module.apply({"params": weights}, inputs, mix, method="embedded")

    def hidden(
        self,
        weights: Weights,
        x: jax.Array,
        sigma: jax.Array | None,
        dropout_key: jax.Array | None = None,
        lengths: jax.Array | None = None,
        by_rows: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Returns `DiT.hidden` of the embedded `x [B, L, D]`.

        Dropout acts if there is a `dropout_key`, as in training; `by_rows` keeps the rows of `[B, ...]` split over devices.
        """
        train = dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None
        module = self.module if by_rows is None else self.module.clone(by_rows=by_rows)
        return module.apply({"params": weights}, x, sigma, train=train, lengths=lengths, rngs=rngs, method="hidden")

    def logits(self, weights: Weights, hidden: jax.Array) -> jax.Array:
        """Returns logits `[..., K]` float32 of `hidden [..., D]`."""
        return head.logits(hidden, weights["head"], self.dtype)

    def chunk(self, batch: int, length: int, shards: int = 1, *, networks: int = 1) -> int:
        """Returns the chunk for `models.head`: for `[batch, length]` over `shards` devices and `networks` sets of logits."""
        return head.chunk_length(networks * -(-batch // shards), length, self.vocab_size, self.head_budget)


@struct.dataclass
class Params:
    """A network with its weights, as `duo_jax.load` returns it: a pytree with the settings in its static part.

    Attributes:
        weights: the parameters, a nested dict of float32 arrays.
        network: the sizes and settings, static.
        tokenizer: a name (`gpt2`) or the folder where the tokenizer is saved, static.
        averaged: whether the weights are averages over training (EMA), static; None if their file does not say.
    """

    weights: Weights
    network: Network = struct.field(pytree_node=False)
    tokenizer: str = struct.field(pytree_node=False)
    averaged: bool | None = struct.field(pytree_node=False, default=None)

    def __repr__(self) -> str:
        """A summary without the weights."""
        net = self.network
        return (
            f"Params({net.algo}, {count(self.weights):,} parameters, D = {net.dim}, {net.blocks} blocks, "
            f"K = {net.vocab_size:,}, L = {net.length}, tokenizer {self.tokenizer!r})"
        )


def chunk_budget(device: Hardware) -> int:
    """Returns the MiB that a chunk of logits may take: 160 on a CPU, else 1/32 of the memory, within 160 to 4096.

    Larger chunks mean fewer, larger matrix products and fewer passes that add up the head's gradient; on a CPU they would
    no longer fit in the caches.
    """
    if device.platform == "cpu":
        return 160
    return 512 if device.memory is None else min(max(device.memory // 32 // 2**20, 160), 4096)


def compute_dtype(precision: str) -> jnp.dtype:
    """Returns the compute type of the blocks.

    `auto` chooses the type of the matrix units: bfloat16 on a TPU and on NVIDIA's Ampere and newer (8.0), float16 on Volta
    and Turing (7.0, 7.5: V100, T4), which emulate bfloat16 slowly, and float32 elsewhere, as on a CPU.
    """
    if precision != "auto":
        return jnp.dtype(precision)
    return fastest_dtype(hardware.present())


def fastest_dtype(device: Hardware) -> jnp.dtype:
    """Returns the compute type with which a device is fastest."""
    if device.platform == "tpu" or device.compute_capability >= 8:
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(jnp.float16 if device.compute_capability >= 7 else jnp.float32)


def count(weights: Weights) -> int:
    """Returns the number of parameters; the leaves may be shapes without values."""
    return sum(int(x.size) for x in jax.tree.leaves(weights))
