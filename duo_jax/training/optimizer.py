"""AdamW with warm-up and clipping, and the exponential moving average (EMA) of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Returns `step -> lr`: linear from 0 over `config.warmup` steps, constant afterwards."""
    # Not optax.linear_schedule: it subtracts from the end value, which in float32 is off by 4e-5 at the first steps.
    return lambda step: config.lr * jnp.minimum(1.0, step / config.warmup) if config.warmup else config.lr


def create(config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of `config.train`: clipping by the global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        ),
    )


def update_ema(ema: Any, params: Any, n: jax.Array, decay: float) -> Any:
    """Returns the average after its n-th update (from 1): `d ema + (1-d) params`, `d = min(decay, (1+n)/(10+n))`.

    The warm-up of d keeps the random start out of the average.
    """
    n = jnp.asarray(n, jnp.float32)
    d = jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda average, new: average + (1 - d) * (new - average), ema, params)
