"""Everything that a run is at one moment, but for the position in its data."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct

from duo_jax.models.network import Network, Weights
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
        teacher: weights that a distilled network learns from; empty otherwise.
    """

    step: jax.Array
    params: Weights
    ema: Weights
    opt_state: optax.OptState
    key: jax.Array
    teacher: Weights


def create(
    network: Network,
    optimizer: optax.GradientTransformation,
    seed: jax.typing.ArrayLike,
    start_from: Weights | None = None,
) -> TrainState:
    """Returns the state before the first step, with fresh weights or a copy of `start_from`."""
    key_init, key_run = jax.random.split(jax.random.key(seed))
    params = network.init(key_init) if start_from is None else start_from
    # Copies, as a donated state may not hold one buffer twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key_run),
        teacher=jax.tree.map(jnp.copy, params) if network.algo == "dcd" else {},
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    make_loss: Callable[[Weights], LossFn],
    optimizer: optax.GradientTransformation,
    ema: float,
    new_teacher: Callable[[TrainState], Weights] = lambda state: state.teacher,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the next state and the step's loss (nats per token) and gradient norm before clipping. Pure.

    Args:
        state: before the step.
        batch: `tokens` and `mask`.
        make_loss: gives the loss for a teacher; see `objectives.training_loss`.
        optimizer: as made by `optimizer.create`.
        ema: the average's decay.
        new_teacher: gives the teacher of the step after; the same one as a rule.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    loss_fn = make_loss(state.teacher)
    (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key, state.step)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    averaged = optimizer_lib.update_ema(state.ema, params, step, ema)
    state = state.replace(step=step, params=params, ema=averaged, opt_state=opt_state)
    return state.replace(teacher=new_teacher(state)), {"loss": loss, "grad_norm": optax.tree.norm(gradient)}


def renew_teacher(state: TrainState, *, every: int, source: str) -> Weights:
    """Returns the `ema` or the `student` itself as the new teacher at the end of each round of `every` steps."""
    weights = state.ema if source == "ema" else state.params
    return jax.lax.cond(state.step % every == 0, lambda: weights, lambda: state.teacher)
