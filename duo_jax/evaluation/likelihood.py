"""Held-out likelihood: nats per token, bits per token and perplexity, and those of token frequencies alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from duo_jax import objectives
from duo_jax.diffusion import categorical, schedules, uniform
from duo_jax.models import head
from duo_jax.models.network import Network
from duo_jax.sampling import networks

# The same noise at every evaluation of every run, so that two figures differ by their networks alone.
_NOISE_SEED = 20_250_615
_FEWEST_BATCHES = 4  # that a standard error is estimated from


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """An average over `tokens` tokens.

    Attributes:
        nll: nats per token.
        tokens: how many were averaged over.
        stderr: standard error of `nll`, from differences between batches in text and noise; NaN for fewer than 4 batches,
            of which it would be too rough an estimate.
        noise: standard error from the noise alone, from differences between the draws of each batch; NaN for one draw.
    """

    nll: float
    tokens: int
    stderr: float = math.nan
    noise: float = math.nan

    @property
    def bpd(self) -> float:
        """Bits per token."""
        return self.nll / math.log(2)

    @property
    def ppl(self) -> float:
        """Perplexity, exp(nll)."""
        return math.exp(min(self.nll, 700.0))

    def figures(self) -> dict[str, float]:
        """Returns all figures by name, without errors that are NaN."""
        errors = {"stderr": self.stderr, "noise": self.noise}
        errors = {name: error for name, error in errors.items() if not math.isnan(error)}
        return {"nll": self.nll, **errors, "bpd": self.bpd, "ppl": self.ppl, "tokens": self.tokens}


@functools.partial(jax.jit, static_argnames=("network", "mesh"))
def nll_sum(
    weights: Any, batch: objectives.Batch, key: jax.Array, *, network: Network, mesh: Mesh | None = None
) -> dict:
    """Returns `{"nll": sum in nats, "tokens": count}` of a batch under the algorithm's bound."""
    return objectives.evaluation_loss(network, mesh=mesh)(weights, batch, key, 0)[1]


@functools.partial(jax.jit, static_argnames=("network", "n_samples"))
def continuation(
    weights: Any,
    tokens: jax.Array,
    first: jax.typing.ArrayLike,
    length: jax.typing.ArrayLike,
    key: jax.Array,
    *,
    network: Network,
    n_samples: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the negative log-likelihood of a text's end, given its beginning, and whether one greedy step writes it.

    The beginning stays clean at every noise level, like a prompt in sampling, and the loss is that of the rest: for
    diffusion networks an upper bound, averaged over `n_samples` draws whose times are spread over [0, 1]; for an
    autoregressive network exact. One program serves all texts that are padded to one L.

    Args:
        weights: the network's parameters.
        tokens: int `[L]`; those from `length` on are padding, which the network does not see.
        first: where the scored part begins, at least 1 for an autoregressive network.
        length: where it ends.
        key: of times and noise. The same key for several ends of one text compares them with little noise.
        network: what the weights are parameters of.
        n_samples: how many draws.

    Returns:
        The nats of all scored tokens together; and a bool: whether each of them is the most probable token at its position,
        all predicted at once from pure noise (autoregressive: each from the text before it).
    """
    place = jnp.arange(tokens.size)
    counted = (place >= first) & (place < length)
    n_rows = 1 if network.algo == "ar" else n_samples
    key_loss, key_prior = jax.random.split(key)

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (n_rows, *x.shape))

    batch = {"tokens": tokens, "mask": counted.astype(jnp.float32), "given": ~counted, "lengths": jnp.asarray(length)}
    sums = objectives.evaluation_loss(network)(weights, jax.tree.map(repeated, batch), key_loss, jnp.asarray(0))[1]
    best = _most_probable(weights, network, tokens[None], counted[None], jnp.asarray(length)[None], key_prior)
    return sums["nll"] / n_rows, jnp.all((best[0] == tokens) | ~counted)


def _most_probable(
    weights: Any, network: Network, tokens: jax.Array, asked: jax.Array, lengths: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns the most probable tokens `[B, L]` where they are asked for, predicted at once from the others."""
    mask_id = network.mask_id

    def best(logits: jax.Array, mask_id: int | None) -> jax.Array:
        return jnp.argmax(logits if mask_id is None else categorical.without(logits, mask_id), axis=-1)

    if network.algo == "ar":
        hidden = network.hidden(weights, network.embed(weights, tokens), None, lengths=lengths)

        def next_token(hidden: jax.Array) -> jax.Array:
            return best(network.logits(weights, hidden), mask_id)

        after = head.in_chunks(next_token, hidden, chunk=network.chunk(*tokens.shape))
        return jnp.roll(after, 1, axis=1)
    absorbing = network.process == "absorbing"
    noise = jnp.full_like(tokens, mask_id) if absorbing else uniform.prior_sample(key, tokens.shape, network.vocab_size)
    sigma = schedules.sigma(schedules.by_name(network.schedule, network.eps).alpha(jnp.ones(len(tokens))))
    denoise = networks.denoiser(network, weights, lengths=lengths)
    return denoise(
        (jnp.where(asked, noise, tokens),), sigma, lambda logits: best(logits[0], mask_id if absorbing else None), asked
    )


def evaluate(
    weights: Any,
    network: Network,
    batches: Iterable[dict[str, np.ndarray]],
    put: Callable[[dict[str, np.ndarray]], objectives.Batch] = jax.device_put,
    *,
    mesh: Mesh | None = None,
    draws: int = 1,
) -> Likelihood:
    """Returns the bound on the negative log-likelihood of held-out batches, with the same draws of noise every time.

    The bound's noise is large: where few tokens are noised, each has a large weight. One row of 64 tokens with K = 2,048 is
    off by about a nat per token, and 84,000 tokens together by 0.03. An autoregressive network's likelihood is exact and
    computed once.

    Args:
        weights: the network's parameters (EMA weights, usually).
        network: what they are parameters of.
        batches: dicts of `tokens` and `mask`, `[B, L]`.
        put: places a batch on the devices.
        mesh: the devices over which the batch is split; None for one device.
        draws: the number of draws of times and noise for each batch.
    """
    key = jax.random.key(_NOISE_SEED)
    draws = 1 if network.algo == "ar" else draws
    sums: list[dict[str, jax.Array]] = []
    for i, batch in enumerate(batches):
        on_device, of_batch = put(batch), jax.random.fold_in(key, i)
        for draw in range(draws):
            noise = jax.random.fold_in(of_batch, draw)
            sums.append(nll_sum(weights, on_device, noise, network=network, mesh=mesh))
            if len(sums) > 1:  # only one stays queued: this bounds the memory, and a bar shows what is done
                sums[-2] = jax.device_get(sums[-2])
    sums = jax.device_get(sums)
    nats, tokens = (np.array([s[name] for s in sums], np.float64).reshape(-1, draws) for name in ("nll", "tokens"))
    return _mean(nats, tokens[:, 0])


def _mean(nats: np.ndarray, tokens: np.ndarray) -> Likelihood:
    """Returns the mean over all tokens from each batch's sums, `[batches, draws]` and `[batches]`, and its errors.

    `stderr` is the error of a ratio of means.
    """
    (n, draws), total = nats.shape, tokens.sum()
    of_batches = nats.mean(axis=1)
    nll = of_batches.sum() / total
    stderr = noise = math.nan
    if n >= _FEWEST_BATCHES:
        stderr = math.sqrt(n / (n - 1) * np.square(of_batches - nll * tokens).sum()) / total
    if draws > 1:
        noise = math.sqrt(nats.var(axis=1, ddof=1).sum() / draws) / total
    return Likelihood(float(nll), int(total), float(stderr), float(noise))


def unigram(counts: np.ndarray, batches: Iterable[dict[str, np.ndarray]], given: int = 0) -> Likelihood:
    """Returns how well token frequencies alone predict the same held-out tokens.

    Args:
        counts: occurrences `[K]` of each token in the training rows; one is added to each, so that none is impossible.
        batches: as for `evaluate`.
        given: how many tokens at the start of each row are given, not predicted.
    """
    nll = np.log(counts.sum() + counts.size) - np.log(counts + 1.0)
    heldout = np.zeros(counts.size, np.int64)
    for batch in batches:
        tokens, mask = batch["tokens"][:, given:], batch["mask"][:, given:]
        heldout += np.bincount(tokens[mask > 0], minlength=counts.size)
    return Likelihood(float((heldout * nll).sum() / heldout.sum()), int(heldout.sum()))
