"""The autoregressive baseline's sampler: one scan over the positions, with the keys and values of the past kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from duo_jax.diffusion import categorical
from duo_jax.diffusion.arrays import keys_of_rows
from duo_jax.models.network import Network
from duo_jax.sampling import ticks
from duo_jax.sampling.settings import Settings


def run(
    network: Network,
    weights: Any,
    keys: jax.Array,
    tokens: jax.Array,
    held: jax.Array,
    settings: Settings,
    top_p: jax.typing.ArrayLike,
    temperature: jax.typing.ArrayLike,
) -> jax.Array:
    """Returns tokens int32 `[B, L]`, each drawn from the network's distribution given those before it.

    `keys` are typed PRNG keys `[B]`, one per text.
    `tokens [B, L]` are kept where `held`, which must be true at position 0 (BOS). A held token conditions what follows it,
    but not what comes before: the network cannot look ahead.
    """
    batch, length = tokens.shape
    module, variables = network.module, {"params": weights}

    def take(carry: tuple[jax.Array, Any], step: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, Any], jax.Array]:
        current, cache = carry
        keys, position, fixed, is_held, reported = step
        hidden, cache = module.apply(variables, current[:, None], cache, position, method="next_hidden")
        logits = categorical.without(network.logits(weights, hidden[:, 0]) / temperature, network.mask_id)
        if settings.nucleus:
            logits = categorical.nucleus(logits, top_p)
        following = jnp.where(is_held, fixed, categorical.draw(keys, logits))
        if settings.reports_steps:
            ticks.report(reported, following[0])
        return (following, cache), following

    cache = module.empty_cache(batch, length - 1)
    keys = keys_of_rows(keys, length - 1)
    steps = (keys.T, jnp.arange(length - 1), tokens[:, 1:].T, held[:, 1:].T, ticks.increments(length - 1))
    _, rest = jax.lax.scan(take, (tokens[:, 0], cache), steps)
    return jnp.concatenate([tokens[:, :1], rest.T], axis=1)
