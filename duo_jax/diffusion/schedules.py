"""Noise schedules (the signal level alpha as a function of time, its derivative and inverse), and random times.

Time runs from 0 (clean) to 1 (noise); alpha falls from 1 to nearly 0. A schedule is a frozen dataclass, so that it can
be a static argument of a jitted function. `alpha`, `dalpha` and `inverse` take arrays of any shape and keep it. An eps
outside [0, 1) raises UserError.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from duo_jax.errors import UserError


class Schedule(Protocol):
    """The interface that samplers and losses use."""

    def alpha(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Signal level alpha(t), same shape as t."""
        ...

    def dalpha(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Derivative d alpha / d t (negative), same shape as t."""
        ...

    def inverse(self, alpha: jax.typing.ArrayLike) -> jax.Array:
        """The time t at which the signal level is alpha, same shape as alpha."""
        ...


def _check_eps(eps: float) -> None:
    if not 0.0 <= eps < 1.0:
        raise UserError(f"a schedule's eps must lie in [0, 1), not {eps}")


def _one_minus_u(t: jax.Array, eps: float) -> jax.Array:
    # 1 - (1-eps) t, in a form that does not cancel as t -> 1, because 1 - t is then exact in floating point.
    return (1.0 - t) + eps * t


@dataclasses.dataclass(frozen=True)
class LogLinear:
    """alpha(t) = 1 - (1-eps) t, so that sigma = -log alpha is logarithmic in t (MDLM, arXiv 2406.07524, app. E.1)."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def alpha(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Signal level alpha(t), same shape as t."""
        return _one_minus_u(jnp.asarray(t), self.eps)

    def dalpha(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Derivative d alpha / d t = -(1-eps), same shape as t."""
        return jnp.full_like(jnp.asarray(t, dtype=jnp.result_type(t, jnp.float32)), -(1.0 - self.eps))

    def inverse(self, alpha: jax.typing.ArrayLike) -> jax.Array:
        """The time t at which the signal level is alpha, same shape as alpha."""
        return (1.0 - jnp.asarray(alpha)) / (1.0 - self.eps)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1-u)) with u = (1-eps) t (MDLM, arXiv 2406.07524, app. E.1)."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def alpha(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Signal level alpha(t), same shape as t."""
        # 1 - cos y = 2 sin^2(y/2): alpha(1) is about 1e-6, which 1 - cos y would round away in float32.
        half_angle = 0.25 * jnp.pi * _one_minus_u(jnp.asarray(t), self.eps)
        return 2.0 * jnp.sin(half_angle) ** 2

    def dalpha(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Derivative d alpha / d t = -(1-eps) pi/2 sin(pi/2 (1-u)), same shape as t."""
        angle = 0.5 * jnp.pi * _one_minus_u(jnp.asarray(t), self.eps)
        return -(1.0 - self.eps) * 0.5 * jnp.pi * jnp.sin(angle)

    def inverse(self, alpha: jax.typing.ArrayLike) -> jax.Array:
        """The time t at which the signal level is alpha, same shape as alpha."""
        angle = 2.0 * jnp.arcsin(jnp.sqrt(0.5 * jnp.asarray(alpha)))
        return (1.0 - angle * (2.0 / jnp.pi)) / (1.0 - self.eps)


def log_linear(eps: float = 1e-3) -> LogLinear:
    """The log-linear schedule, whose last signal level is alpha(1) = eps. UserError for an eps outside [0, 1)."""
    return LogLinear(eps)


def cosine(eps: float = 1e-3) -> Cosine:
    """The cosine schedule, whose last signal level is alpha(1) = 1 - cos(pi/2 eps). UserError for an eps outside [0, 1)."""
    return Cosine(eps)


_BY_NAME = {"log_linear": log_linear, "cosine": cosine}


def by_name(name: str, eps: float = 1e-3) -> Schedule:
    """The schedule of a configuration: `log_linear` (also `log-linear`, `loglinear`) or `cosine`.

    Raises:
        UserError: another name, or an eps outside [0, 1).
    """
    spelled = {"log-linear": "log_linear", "loglinear": "log_linear"}.get(name, name)
    if spelled not in _BY_NAME:
        raise UserError(f"unknown noise schedule {name!r}: choose one of {', '.join(_BY_NAME)}")
    return _BY_NAME[spelled](eps)


def sigma(alpha: jax.typing.ArrayLike) -> jax.Array:
    """The noise level that conditions the network, sigma = -log alpha, same shape as alpha."""
    return -jnp.log(jnp.asarray(alpha))


def stratified_times(
    cell: jax.typing.ArrayLike, offset: jax.typing.ArrayLike, n: jax.typing.ArrayLike, eps: float = 1e-3
) -> jax.Array:
    """Low-discrepancy times: cuts [eps, 1] into `n` equal cells; returns the time at `offset` in [0, 1) of a cell.

    t = eps + (1-eps) (cell + offset) / n (I, section 5; VDM, app. I.1). With one offset for all cells the times are equally
    spaced; together they cover [eps, 1] evenly, which lowers the variance of a loss. A single time is uniform only if its
    cell is random: see `objectives.Objective.times`. The arguments broadcast.
    """
    return eps + (1.0 - eps) * ((jnp.asarray(cell) + offset) / n)


def towards_zero(t: jax.typing.ArrayLike, eps: float = 1e-3) -> tuple[jax.Array, jax.Array]:
    """Maps times t uniform in [eps, 1] to times of density proportional to 1/sqrt(t); returns them and their weights.

    Both have t's shape. The mean of weight * f over the new times is the mean of f over the old ones, with less variance if
    f is a bound on a likelihood: at low noise a token is wrong with probability t and then costs c/t. The second moments of
    that cost are log(1/eps) c^2 = 6.9 c^2 and, weighted, 3.8 c^2 at eps = 1e-3; its variances are 5.9 c^2 and 2.8 c^2.
    """
    low = eps**0.5
    root = low + (jnp.asarray(t) - eps) * (1.0 - low) / (1.0 - eps)
    return jnp.square(root), 2.0 * root * (1.0 - low) / (1.0 - eps)
