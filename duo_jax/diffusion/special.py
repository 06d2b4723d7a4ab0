"""Scalar functions in forms that are accurate in float32."""

import math

import jax
import jax.numpy as jnp
from jax import lax


def excess(d: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """d - log(1+d) >= 0, to float32's full relative accuracy, for a caller that knows log(1+d), `log_ratio`; any shape.

    This is r_hat/r - 1 - log(r_hat/r), the convex gap of which every bound here is a sum. Near d = 0 the two terms
    cancel; there, with w = d/(2+d), log(1+d) = 2 artanh(w) and d - 2w = d w, so only small corrections are subtracted.
    Automatic differentiation is right only through both arguments together, as in `absorbing.sedd_nelbo`, because near 0
    the value is computed from d alone; and only for finite d: at d = inf the value is right and the gradient NaN.
    `uniform_nelbo` and `distillation` have gradients in closed form.
    """
    w = d / (2.0 + d)
    w2 = w * w
    near_zero = w * (d - 2.0 * w2 * (1.0 / 3.0 + w2 * (1.0 / 5.0 + w2 * (1.0 / 7.0 + w2 * (1.0 / 9.0 + w2 / 11.0)))))
    return jnp.where(jnp.abs(d) < 0.3, near_zero, d - log_ratio)


def ndtr(z: jax.Array) -> jax.Array:
    """The normal distribution function Phi(z), any shape, relatively accurate in the lower tail."""
    return 0.5 * lax.erfc(-z * math.sqrt(0.5))


def log_scaled_upper_tail(y: jax.Array) -> jax.Array:
    """log(exp(y^2/2) Phi(-y)) for y >= 0, any shape: the normal tail without its Gaussian factor."""
    near = jnp.minimum(y, 5.0)
    far = jnp.maximum(y, 5.0)
    fraction = far
    for n in range(10, 0, -1):  # Laplace's continued fraction of Mills' ratio
        fraction = far + n / fraction
    return jnp.where(y < 5.0, jnp.log(ndtr(-near)) + 0.5 * near**2, -jnp.log(fraction) - 0.5 * math.log(2.0 * math.pi))


def log_mean_exp_below(a: jax.Array, scale: jax.Array) -> jax.Array:
    """log E[exp(v - c) | v < c] for v ~ N(0, scale^2) and c = a scale, any shape (II, app. on the softmax's denominator).

    The textbook form of log E[exp(v) | v < c], scale^2/2 + log Phi(a - scale) - log Phi(a), subtracts numbers of order
    scale^2, and scale reaches 1000 and more. Here the squares are cancelled analytically if Phi's argument is in the lower
    tail, and c is left out, so that the result is of order log(scale).
    """
    y = scale - a
    tail = jnp.where(
        y > 0.0,
        log_scaled_upper_tail(jnp.maximum(y, 0.0)) - 0.5 * a**2,
        (0.5 * scale - a) * scale + jnp.log(ndtr(-jnp.minimum(y, 0.0))),
    )
    # If a is in the lower tail, the a^2 / 2 of Phi(a) and of the numerator cancel.
    low = log_scaled_upper_tail(jnp.maximum(y, 0.0)) - log_scaled_upper_tail(jnp.maximum(-a, 0.0))
    return jnp.where(a > 0.0, tail - jnp.log1p(-ndtr(-jnp.maximum(a, 0.0))), low)
