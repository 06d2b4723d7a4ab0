"""Scalar functions that float32 needs in a careful form."""

import jax
import jax.numpy as jnp


def excess(d: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """d - log(1+d) >= 0, to full relative accuracy, where the caller knows log(1+d) as `log_ratio`; any shape.

    This is r_hat/r - 1 - log(r_hat/r), the convex gap of which every bound here is a sum. Near d = 0 the two terms
    cancel; there, with w = d/(2+d), log(1+d) = 2 artanh(w) and d - 2w = d w, so only small corrections are subtracted.
    Not for automatic differentiation: those who use it give their gradients in closed form.
    """
    w = d / (2.0 + d)
    w2 = w * w
    near_zero = w * (d - 2.0 * w2 * (1.0 / 3.0 + w2 * (1.0 / 5.0 + w2 / 7.0)))
    return jnp.where(jnp.abs(d) < 0.3, near_zero, d - log_ratio)
