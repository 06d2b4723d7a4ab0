"""Everything that a run is at one moment, but for the position in its data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.dynamic_scale import DynamicScale

from duo_jax.models.network import Network, Weights
from duo_jax.objectives import Batch, LossFn
from duo_jax.training import optimizer as optimizer_lib

# A gradient that overflows below this is not one that a scale would cure.
_SMALLEST_SCALE = 2.0**-14


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
        loss_scale: what a loss computed in float16 is multiplied by, so that its gradient does not vanish; empty otherwise.
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
    # Copies, as a donated state may not hold one buffer twice.
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
    """Returns the scale to start from: halved whenever a gradient overflows, doubled after 2,000 steps without."""
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

    With a loss scale also the scale, and whether the step was skipped because its gradient overflowed.

    Args:
        state: before the step.
        batch: `tokens` and `mask`.
        make_loss: gives the loss for a teacher; see `objectives.training_loss`.
        optimizer: as made by `optimizer.create`.
        ema: the average's decay.
        new_teacher: gives the teacher of the step after; the same one as a rule.
        accumulate: in how many parts of the rows the gradient is computed, one after the other.
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
        # A step whose gradient overflowed teaches nothing but a smaller scale.
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
    """A loss, its gradient, and of how many tokens they are the mean; with a loss scale the next one, else empty."""

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
    """Returns what all rows give from `n` parts of them, each with noise of its own: the mean over the tokens of all."""
    # Every n-th row, so that each part is spread over the devices as the whole is.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), batch)

    def weighed(found: _Found) -> _Found:
        loss, gradient = jax.tree.map(lambda x: x * found.tokens, (found.loss, found.gradient))
        return found._replace(loss=loss, gradient=gradient)

    def add(so_far: _Found, part: tuple[Batch, jax.Array]) -> tuple[_Found, None]:
        found = weighed(gradient_of(part[0], jax.random.fold_in(key, part[1])))
        total = jax.tree.map(jnp.add, so_far[:3], found[:3])
        # The next scale follows from the last one and from whether all is finite: where a part is not, its is the smaller.
        scale = jax.tree.map(jnp.minimum, so_far.loss_scale, found.loss_scale)
        return _Found(*total, scale, so_far.finite & found.finite), None

    shapes = jax.eval_shape(gradient_of, jax.tree.map(lambda x: x[0], parts), key)
    nothing = jax.tree.map(jnp.zeros_like, shapes)
    largest = jax.tree.map(lambda x: jnp.full(x.shape, jnp.finfo(x.dtype).max if jnp.issubdtype(x.dtype, jnp.floating)
                                              else jnp.iinfo(x.dtype).max, x.dtype), shapes.loss_scale)  # fmt: skip
    nothing = nothing._replace(loss_scale=largest, finite=jnp.asarray(True))
    total = jax.lax.scan(add, nothing, (parts, jnp.arange(n)))[0]
    loss, gradient = jax.tree.map(lambda x: x / jnp.maximum(total.tokens, 1), (total.loss, total.gradient))
    return total._replace(loss=loss, gradient=gradient)


def renew_teacher(state: TrainState, *, every: int, source: str) -> Weights:
    """Returns the `ema` or the `student` itself as the new teacher at the end of each round of `every` steps."""
    weights = state.ema if source == "ema" else state.params
    return jax.lax.cond(state.step % every == 0, lambda: weights, lambda: state.teacher)
