"""The state of a run after some step: all but its position in the data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.dynamic_scale import DynamicScale

from duo_jax.models.network import Network, Weights
from duo_jax.objectives import Batch, LossFn
from duo_jax.training import optimizer as optimizer_lib

# A gradient that overflows even at this scale has another fault, which a smaller scale would not cure.
_SMALLEST_SCALE = 2.0**-14


@struct.dataclass
class TrainState:
    """A pytree of arrays.

    Attributes:
        step: steps taken, int32.
        params: float32 weights.
        ema: the moving average of `params`; evaluation uses it.
        opt_state: the optimizer's moments.
        key: data of the PRNG key (uint32); each step folds its number into it.
        teacher: in distillation, the weights to learn from; otherwise empty.
        loss_scale: in float16, the factor on the loss that keeps its gradient from vanishing; otherwise empty.
    """

    step: jax.Array
    params: Weights
    ema: Weights
    opt_state: optax.OptState
    key: jax.Array
    teacher: Weights
    loss_scale: DynamicScale | dict


def create(
    network: Network,
    optimizer: optax.GradientTransformation,
    seed: jax.typing.ArrayLike,
    start_from: Weights | None = None,
) -> TrainState:
    """Returns the state before the first step, with fresh weights or a copy of `start_from`."""
    key_init, key_run = jax.random.split(jax.random.key(seed))
    params = network.init(key_init) if start_from is None else start_from
    # Copies, because a donated state must not hold one buffer twice.
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key_run),
        teacher=jax.tree.map(jnp.copy, params) if network.algo == "dcd" else {},
        loss_scale=new_loss_scale() if network.dtype == jnp.float16 else {},
    )


def new_loss_scale() -> DynamicScale:
    """Returns the first scale: it halves when a gradient overflows, and doubles after 2,000 steps without an overflow."""
    return DynamicScale(
        scale=jnp.float32(2.0**16), fin_steps=jnp.int32(0), minimum_scale=_SMALLEST_SCALE, growth_interval=2_000
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    make_loss: Callable[[Weights], LossFn],
    optimizer: optax.GradientTransformation,
    ema: float,
    new_teacher: Callable[[TrainState], Weights] = lambda state: state.teacher,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the next state and the step's loss (nats per token) and gradient norm before clipping. Pure.

    With a loss scale, the metrics also hold the scale and whether the step was skipped because its gradient overflowed.

    Args:
        state: before the step.
        batch: `tokens` and `mask`.
        make_loss: maps the teacher's weights to the loss; see `objectives.training_loss`.
        optimizer: from `optimizer.create`.
        ema: the average's decay.
        new_teacher: maps the new state to the teacher of the next step; by default the teacher stays.
        accumulate: the number of parts in which the gradient of the rows is computed, one after the other.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    scaled = isinstance(state.loss_scale, DynamicScale)
    gradient_of = functools.partial(_gradient, make_loss(state.teacher), state)
    found = gradient_of(batch, key) if accumulate == 1 else _sum_of_parts(gradient_of, batch, key, accumulate)
    loss, gradient, loss_scale, finite = found.loss, found.gradient, found.loss_scale, found.finite

    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    averaged = optimizer_lib.update_ema(state.ema, params, step, ema)
    learnt = {"params": params, "ema": averaged, "opt_state": opt_state}
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
    if scaled:
        # A step whose gradient overflowed changes only the scale.
        learnt = {
            name: jax.tree.map(functools.partial(jnp.where, finite), new, getattr(state, name))
            for name, new in learnt.items()
        }
        skipped = ~finite & (loss_scale.scale > _SMALLEST_SCALE)
        metrics["grad_norm"] = jnp.where(skipped, 0.0, metrics["grad_norm"])
        metrics |= {"loss_scale": loss_scale.scale, "skipped": skipped.astype(jnp.float32)}
    state = state.replace(step=step, loss_scale=loss_scale, **learnt)
    return state.replace(teacher=new_teacher(state)), metrics


class _Found(NamedTuple):
    """What one forward and backward pass gives.

    Attributes:
        loss, gradient: means over `tokens` tokens.
        loss_scale: the scale for the next step; empty without one.
        finite: whether the gradient is finite; True without a loss scale.
    """

    loss: jax.Array
    gradient: Weights
    tokens: jax.Array
    loss_scale: DynamicScale | dict
    finite: jax.Array


def _gradient(loss_fn: LossFn, state: TrainState, batch: Batch, key: jax.Array) -> _Found:
    if isinstance(state.loss_scale, DynamicScale):
        scale, finite, (loss, aux), gradient = state.loss_scale.value_and_grad(loss_fn, has_aux=True)(
            state.params, batch, key, state.step
        )
        return _Found(loss, gradient, aux["tokens"], scale, finite)
    (loss, aux), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key, state.step)
    return _Found(loss, gradient, aux["tokens"], {}, jnp.asarray(True))


def _sum_of_parts(gradient_of: Callable[[Batch, jax.Array], _Found], batch: Batch, key: jax.Array, n: int) -> _Found:
    """Returns the mean over all tokens of a batch, computed in `n` parts of its rows one after the other.

    Each part draws noise of its own.
    """
    # Part i holds the rows i, i + n, i + 2n, ..., so that each part is spread over the devices as the whole batch is.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), batch)

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, tuple[DynamicScale | dict, jax.Array]]:
        found = gradient_of(part[0], jax.random.fold_in(key, part[1]))
        loss, gradient = jax.tree.map(lambda x: x * found.tokens, (found.loss, found.gradient))
        return jax.tree.map(jnp.add, total, (loss, gradient, found.tokens)), (found.loss_scale, found.finite)

    shapes = jax.eval_shape(gradient_of, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(jnp.zeros_like, (shapes.loss, shapes.gradient, shapes.tokens))
    (loss, gradient, tokens), (scales, finite) = jax.lax.scan(add, zeros, (parts, jnp.arange(n)))
    loss, gradient = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1), (loss, gradient))
    # All parts start from one scale. A part whose gradient overflowed proposes a smaller next scale than the others.
    scale = jax.tree.map(lambda x: x.min(axis=0), scales)
    return _Found(loss, gradient, tokens, scale, finite.all())


def renew_teacher(state: TrainState, *, every: int, source: str) -> Weights:
    """Returns the teacher of the next step: renewed from `source` (`ema` or `student`) after every `every` steps."""
    weights = state.ema if source == "ema" else state.params
    return jax.lax.cond(state.step % every == 0, lambda: weights, lambda: state.teacher)
