"""How a compiled sampler reports its steps to the host, for a progress bar."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax import progress

# Few reports, since the device waits for the host at each.
_MOST_REPORTS = 100


def increments(steps: int) -> jax.Array:
    """Returns how many steps to report after each step, int32 `[steps]`; 0 for most if there are many."""
    every = -(-steps // _MOST_REPORTS)
    reported = np.where(np.arange(1, steps + 1) % every == 0, every, 0)
    reported[-1] = steps - reported[:-1].sum()
    return jnp.asarray(reported, jnp.int32)


def report(steps: jax.Array, made: jax.Array) -> None:
    """Calls `progress.report_steps` with a number of steps, unless it is 0, once the scalar `made` has been computed."""
    jax.lax.cond(steps > 0, lambda: jax.debug.callback(progress.report_steps, steps, made), lambda: None)
