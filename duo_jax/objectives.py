"""What is minimised: for each algorithm one pure `loss_fn(params, batch, key, step) -> (loss, aux)`.

`params` are a network's weights, `batch` holds `tokens` and `mask`, both `[B, L]`, and `aux` the sum of the loss over the
tokens that the mask keeps (nats) and their number, from which averages over many batches are made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax.diffusion import schedules, uniform
from duo_jax.diffusion.arrays import per_token
from duo_jax.models.network import Network

Batch = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def _mean(nll: jax.Array, mask: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Averages nats per token `[B, L]` over the tokens that count."""
    mask = mask.astype(nll.dtype)
    total, tokens = jnp.sum(nll * mask), jnp.sum(mask)
    return total / jnp.maximum(tokens, 1), {"nll": total, "tokens": tokens}


def duo_base(network: Network, *, train: bool, shards: int = 1) -> LossFn:
    """Returns the discrete NELBO of uniform-state diffusion (SPEC 2; The Diffusion Duality, f_Duo).

    Each row has one time t, low-discrepancy over the whole batch; z_t is drawn from q(z_t | x); the loss is in nats per
    token.

    Args:
        network: the sizes, the schedule and the range of t.
        train: whether dropout acts.
        shards: how many devices the batch is split over.
    """
    schedule = schedules.by_name(network.schedule, network.eps)

    def loss_fn(params: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        del step  # the same objective from the first step to the last
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        t = schedules.sample_t(key_t, x.shape[0], network.eps_t)
        alpha_t, dalpha_t = schedule.alpha(t), schedule.dalpha(t)
        z_t = uniform.q_sample(key_z, x, alpha_t, network.vocab_size)
        predict = network.predict(params, dropout_key=key_dropout if train else None, shards=shards)
        spread = (per_token(alpha_t, x.shape), per_token(dalpha_t, x.shape))
        nll = predict(z_t, schedules.sigma(alpha_t), uniform.nelbo_from_logits, z_t, x, *spread)
        return _mean(nll, batch["mask"])

    return loss_fn


_TRAINING = {"duo_base": duo_base}
# What the held-out likelihood is measured with, whatever the network was trained on.
_EVALUATION = {"duo_base": duo_base}


def training_loss(network: Network, *, shards: int = 1) -> LossFn:
    """Returns the loss that `config.algo.name` trains on."""
    return _TRAINING[network.algo](network, train=True, shards=shards)


def evaluation_loss(network: Network, *, shards: int = 1) -> LossFn:
    """Returns the bound on the negative log-likelihood that `config.algo.name` is evaluated with."""
    return _EVALUATION[network.algo](network, train=False, shards=shards)
