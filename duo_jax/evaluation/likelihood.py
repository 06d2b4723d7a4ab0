"""Held-out likelihood: nats per token, bits per token and perplexity, and what simple models reach beside it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from duo_jax import objectives
from duo_jax.models.network import Network

# The same noise at every evaluation of every run, so that two figures differ by their networks alone.
_NOISE_SEED = 20_250_615


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """An average over `tokens` tokens.

    Attributes:
        nll: nats per token.
        tokens: how many were averaged over.
    """

    nll: float
    tokens: int

    @property
    def bpd(self) -> float:
        """Bits per token."""
        return self.nll / math.log(2)

    @property
    def ppl(self) -> float:
        """Perplexity, exp(nll)."""
        return math.exp(min(self.nll, 700.0))


@functools.partial(jax.jit, static_argnames=("network", "mesh"))
def nll_sum(
    weights: Any, batch: objectives.Batch, key: jax.Array, *, network: Network, mesh: Mesh | None = None
) -> dict:
    """Returns `{"nll": sum in nats, "tokens": count}` of a batch under the algorithm's bound."""
    return objectives.evaluation_loss(network, mesh=mesh)(weights, batch, key, 0)[1]


def evaluate(
    weights: Any,
    network: Network,
    batches: Iterable[dict[str, np.ndarray]],
    put: Callable[[dict[str, np.ndarray]], objectives.Batch] = jax.device_put,
    *,
    mesh: Mesh | None = None,
) -> Likelihood:
    """Returns the bound on the negative log-likelihood of held-out batches, with one fixed draw of noise a batch.

    Args:
        weights: the network's parameters (EMA weights, usually).
        network: what they are parameters of.
        batches: dicts of `tokens` and `mask`, `[B, L]`.
        put: places a batch on the devices.
        mesh: the devices over which the batch is split; None for one device.
    """
    key = jax.random.key(_NOISE_SEED)
    sums: list[dict[str, jax.Array]] = []
    for i, batch in enumerate(batches):
        sums.append(nll_sum(weights, put(batch), jax.random.fold_in(key, i), network=network, mesh=mesh))
        if i:  # one batch is queued, never all of them: that bounds their memory, and a bar tells what is done
            sums[-2] = jax.device_get(sums[-2])
    sums = jax.device_get(sums)
    tokens = sum(int(s["tokens"]) for s in sums)
    return Likelihood(sum(float(s["nll"]) for s in sums) / tokens, tokens)


def unigram(counts: np.ndarray, batches: Iterable[dict[str, np.ndarray]], given: int = 0) -> Likelihood:
    """Returns how well token frequencies alone predict the same held-out tokens.

    Args:
        counts: occurrences `[K]` of each token in the training rows; one is added to each, so that none is impossible.
        batches: as for `evaluate`.
        given: so many tokens at the start of each row are given, not predicted.
    """
    nll = np.log(counts.sum() + counts.size) - np.log(counts + 1.0)
    heldout = np.zeros(counts.size, np.int64)
    for batch in batches:
        tokens, mask = batch["tokens"][:, given:], batch["mask"][:, given:]
        heldout += np.bincount(tokens[mask > 0], minlength=counts.size)
    return Likelihood(float((heldout * nll).sum() / heldout.sum()), int(heldout.sum()))
