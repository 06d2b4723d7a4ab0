"""Everything that a run is at one moment, but for the position in its data."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from duo_jax.models.network import Network
from duo_jax.objectives import Batch, LossFn
from duo_jax.training import optimizer as optimizer_lib


@struct.dataclass
class TrainState:
    """A pytree of arrays.

    Attributes:
        step: steps taken, int32.
        params: float32 weights.
        ema: their moving average, with which the network is evaluated.
        opt_state: the optimizer's moments.
        key: data of the PRNG key (uint32) from which each step's key is folded.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: optax.OptState
    key: jax.Array


def create(network: Network, optimizer: optax.GradientTransformation, seed: jax.typing.ArrayLike) -> TrainState:
    """Returns the state before the first step."""
    key_init, key_run = jax.random.split(jax.random.key(seed))
    params = network.init(key_init)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy, as a donated state may not hold one buffer twice.
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key_run),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema: float,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the next state and the step's loss (nats per token) and gradient norm before clipping. Pure."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key, state.step)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    averaged = optimizer_lib.update_ema(state.ema, params, step, ema)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(step, params, averaged, opt_state, state.key), metrics
