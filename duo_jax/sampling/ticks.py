"""How a compiled sampler tells the host of its steps, for a progress bar."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax import progress

# A device waits until the host has heard it out.
_MOST = 100


def portions(steps: int) -> jax.Array:
    """Returns of how many steps is told after each of so many, int32 `[steps]`: 0 after most, where they are many."""
    every = -(-steps // _MOST)
    told = np.where(np.arange(1, steps + 1) % every == 0, every, 0)
    told[-1] = steps - told[:-1].sum()
    return jnp.asarray(told, jnp.int32)


def tell(steps: jax.Array, made: jax.Array) -> None:
    """Calls `progress.report_steps` if `steps` is not 0, once `made`, a scalar, has been computed."""
    jax.lax.cond(steps > 0, lambda: jax.debug.callback(progress.report_steps, steps, made), lambda: None)
