"""The diffusion transformation operator by name: exact, as a power series, or as the fits of paper II, for any K.

Each operator is a frozen dataclass, so that it can be a static argument of a jitted function, with alpha(gamma) and
dalpha(gamma) = d alpha / d gamma of gamma's shape. Exact is the default and costs no more than the others, which are
here for parity with *The Diffusion Duality, Chapter II* (arXiv 2602.21185). Fits are made on the host, to the exact one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_ndtr

from duo_jax.diffusion import duality
from duo_jax.diffusion.arrays import check_vocab_size
from duo_jax.errors import UserError

# The series is summed in powers of mu / 4, a typical mu, to keep float32's exponents small.
_SERIES_CENTRE = 4.0
_SERIES_REACH = -4.0  # the smallest gamma for which 150 terms are enough
_FIT_POINTS = 513


@dataclasses.dataclass(frozen=True)
class Exact:
    """The operator by quadrature, see `duality.alpha`; both methods raise UserError for K below 2."""

    vocab_size: int

    def alpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """T(gamma), same shape as gamma."""
        return duality.alpha(gamma, self.vocab_size)

    def dalpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """d T / d gamma, same shape as gamma."""
        return duality.dalpha(gamma, self.vocab_size)


@functools.lru_cache(maxsize=32)
def series_coefficients(vocab_size: int, n_terms: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms (float64 `[n_terms]` each) of the power series' coefficients in mu, which are non-negative.

    m_n = int z^n phi Phi^(K-1) dz / n!, of which P = exp(-mu^2/2) sum_n m_n mu^n (II, the series form), and
    d_n = K int z^n phi^2 Phi^(K-2) dz / n!, of which d T / d mu = exp(-mu^2/2) sum_n d_n mu^n / sqrt(2 pi).
    """
    step = 1.0 / 32.0
    z = np.arange(-20.0, 30.0, step) + 0.5 * step
    n = np.arange(n_terms)[:, None]
    log_factorial = np.array([math.lgamma(v + 1.0) for v in range(n_terms)])
    log_cdf, log_phi = log_ndtr(z), -0.5 * z**2 - 0.5 * math.log(2.0 * math.pi)
    sign = np.where((z < 0) & (n % 2 == 1), -1.0, 1.0)
    log_power = n * np.log(np.abs(z)) - log_factorial[:, None] + math.log(step)

    def log_integral(log_weight: np.ndarray) -> np.ndarray:
        total = np.sum(sign * np.exp(log_power + log_weight), axis=-1)
        # At K = 2 odd coefficients are 0 by symmetry; rounding may make them negative, which has no logarithm.
        return np.log(np.maximum(total, 1e-300))

    values = log_integral(log_phi + (vocab_size - 1) * log_cdf)
    slopes = log_integral(2.0 * log_phi + (vocab_size - 2) * log_cdf) + math.log(vocab_size * math.sqrt(2.0 * math.pi))
    return values, slopes


@dataclasses.dataclass(frozen=True)
class Series:
    """The operator as a power series in mu = exp(-gamma/2); 150 terms suffice for gamma >= -4 (II, the series form)."""

    vocab_size: int
    n_terms: int = 150

    def _sum(self, log_coefficients: np.ndarray, mu: jax.Array) -> jax.Array:
        """exp(-mu^2/2) sum_n c_n mu^n from the logarithms of non-negative c_n; `mu` of any shape."""
        n = np.arange(len(log_coefficients))
        scaled = jnp.asarray(log_coefficients + n * math.log(_SERIES_CENTRE), mu.dtype)
        powers = n.astype(mu.dtype) * jnp.log(mu / _SERIES_CENTRE)[..., None]
        return jnp.sum(jnp.exp(scaled + powers - 0.5 * mu[..., None] ** 2), axis=-1)

    def alpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """T(gamma), same shape as gamma."""
        mu = jnp.exp(-0.5 * jnp.asarray(gamma, jnp.result_type(gamma, jnp.float32)))
        log_m, _ = series_coefficients(self.vocab_size, self.n_terms)
        # The term n = 0 is exp(-mu^2/2) / K; expm1 combines it with the -1/K of T.
        rest = self._sum(np.concatenate([[-np.inf], log_m[1:]]), mu)
        return (self.vocab_size * rest + jnp.expm1(-0.5 * mu**2)) / (self.vocab_size - 1)

    def dalpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """d T / d gamma, same shape as gamma."""
        mu = jnp.exp(-0.5 * jnp.asarray(gamma, jnp.result_type(gamma, jnp.float32)))
        _, log_d = series_coefficients(self.vocab_size, self.n_terms)
        return -0.5 * mu * self._sum(log_d, mu) / math.sqrt(2.0 * math.pi)


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """alpha = sum_n c_n (2t - 1)^n with t = (gamma - gamma_min) / (gamma_max - gamma_min) in [0, 1].

    In powers of t itself the coefficients would be large and alternate in sign, and float32 would lose their sum.
    """

    gamma_min: float
    gamma_max: float
    coefficients: tuple[float, ...]

    def alpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """The fitted T(gamma), same shape as gamma."""
        return jnp.polyval(jnp.array(self.coefficients[::-1]), 2.0 * _time(gamma, self) - 1.0)

    def dalpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """Its derivative in gamma, same shape as gamma."""
        slopes = [2.0 * n * c for n, c in enumerate(self.coefficients)][1:]
        slope = jnp.polyval(jnp.array(slopes[::-1]), 2.0 * _time(gamma, self) - 1.0)
        return slope / (self.gamma_max - self.gamma_min)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """alpha = a sigmoid(b t + c) + d + e (t - 1/2) tanh^2(f t + g), t as in `Polynomial`; e = 0 without the edges."""

    gamma_min: float
    gamma_max: float
    coefficients: tuple[float, ...]

    def alpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """The fitted T(gamma), same shape as gamma."""
        return _sigmoid_curve(_time(gamma, self), self.coefficients, jnp.tanh)

    def dalpha(self, gamma: jax.typing.ArrayLike) -> jax.Array:
        """Its derivative in gamma, same shape as gamma."""
        t = _time(gamma, self)
        a, b, c, _, e, f, g = self.coefficients
        body, edge = jax.nn.sigmoid(b * t + c), jnp.tanh(f * t + g)
        slope = a * b * body * (1.0 - body) + e * edge**2 + 2.0 * e * f * (t - 0.5) * edge * (1.0 - edge**2)
        return slope / (self.gamma_max - self.gamma_min)


Operator = Exact | Series | Polynomial | Sigmoid


def _time(gamma: jax.typing.ArrayLike, fit: Polynomial | Sigmoid) -> jax.Array:
    gamma = jnp.asarray(gamma, jnp.result_type(gamma, jnp.float32))
    return (gamma - fit.gamma_min) / (fit.gamma_max - fit.gamma_min)


def _sigmoid_curve(t: jax.Array, coefficients: tuple[float, ...], tanh: Callable) -> jax.Array:
    a, b, c, d, e, f, g = coefficients
    return a * 0.5 * (1.0 + tanh(0.5 * (b * t + c))) + d + e * (t - 0.5) * tanh(f * t + g) ** 2


def _fit_polynomial(degree: int, t: np.ndarray, target: np.ndarray) -> tuple[float, ...]:
    return tuple(float(c) for c in np.polynomial.polynomial.polyfit(2.0 * t - 1.0, target, degree))


def _fit_sigmoid(t: np.ndarray, target: np.ndarray, *, edges: bool) -> tuple[float, ...]:
    from scipy import optimize  # slow to import, and only these two forms need it

    no_edges = (0.0, 0.0, 0.0)
    plain = optimize.least_squares(
        lambda p: _sigmoid_curve(t, (*p, *no_edges), np.tanh) - target, (1.0, -5.0, 2.0, 0.0)
    ).x
    if not edges:
        return (*map(float, plain), *no_edges)
    # The correction switches near the middle of the curve; its starting place decides which local minimum is found.
    starts = [(*plain, -0.1, 20.0, -20.0 * centre) for centre in (0.35, 0.5, 0.65)]
    fits = [optimize.least_squares(lambda p: _sigmoid_curve(t, p, np.tanh) - target, start) for start in starts]
    return tuple(map(float, min(fits, key=lambda fit: fit.cost).x))


def _exact_on_host(gamma: np.ndarray, vocab_size: int) -> np.ndarray:
    """T(gamma) `[n]` in float64 with NumPy, so that a fit can be made while JAX traces a function."""
    mu = np.exp(-0.5 * gamma)[:, None]
    z = np.arange(-12.0, max(14.0, mu.max() + 9.0), 1.0 / 16.0)
    log_cdf = (vocab_size - 1) * log_ndtr(z)
    win = np.sum(np.exp(-0.5 * (z - mu) ** 2 + log_cdf), axis=-1) / (16.0 * math.sqrt(2.0 * math.pi))
    return (vocab_size * win - 1.0) / (vocab_size - 1.0)


def inverse(alpha: float, vocab_size: int) -> float:
    """The gamma at which T(gamma) = alpha, by bisection on the host in float64; alpha in (0, 1).

    Raises:
        UserError: K below 2, or an alpha outside (0, 1) or below T(30), which is 1.7e-7 for K = 2 and less for larger K.
    """
    check_vocab_size(vocab_size)
    if not 0.0 < alpha < 1.0:
        raise UserError(f"no gamma gives the signal level alpha = {alpha}; it must lie strictly between 0 and 1")
    low, high = -12.0, 30.0  # T(-12) = 1 in float64, for any vocabulary
    if alpha < (least := float(_exact_on_host(np.array([high]), vocab_size)[0])):
        raise UserError(f"no gamma up to {high:g} gives the signal level alpha = {alpha}; the least is {least:.1e}")
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _exact_on_host(np.array([middle]), vocab_size)[0] > alpha else (low, middle)
    return 0.5 * (low + high)


NAMES = ("exact", "series", "sigmoid", "sigmoid-edge-corrected", "poly3", "poly5", "poly7", "poly9")


@functools.lru_cache(maxsize=64)
def by_name(name: str, vocab_size: int, gamma_min: float, gamma_max: float) -> Operator:
    """The operator with one of the `NAMES`, for gamma in [gamma_min, gamma_max].

    Raises:
        UserError: K below 2, an unknown name, an empty range, or a range that the series does not cover.
    """
    check_vocab_size(vocab_size)
    if name not in NAMES:
        raise UserError(
            f"unknown form of the diffusion transformation operator {name!r}: choose one of {', '.join(NAMES)}"
        )
    if not gamma_min < gamma_max:
        raise UserError(f"gamma_min ({gamma_min}) must lie below gamma_max ({gamma_max})")
    if name == "exact":
        return Exact(vocab_size)
    if name == "series":
        if gamma_min < _SERIES_REACH:
            raise UserError(
                f"the series form of the operator is right for gamma >= {_SERIES_REACH:g} only, and gamma_min is "
                f"{gamma_min:g}; use the exact operator"
            )
        return Series(vocab_size)
    t = np.linspace(0.0, 1.0, _FIT_POINTS)
    target = _exact_on_host(gamma_min + t * (gamma_max - gamma_min), vocab_size)
    if name.startswith("poly"):
        return Polynomial(gamma_min, gamma_max, _fit_polynomial(int(name.removeprefix("poly")), t, target))
    return Sigmoid(gamma_min, gamma_max, _fit_sigmoid(t, target, edges=name == "sigmoid-edge-corrected"))


def check_levels(name: str, vocab_size: int, gamma_min: float, gamma_max: float) -> None:
    """Raises UserError if an operator, which may be a fit, gives signal levels outside (0, 1] on a range of gamma.

    Such a level gives no distribution of z_t or no noise level -log(alpha). Raises the errors of `by_name`, too.
    """
    with jax.ensure_compile_time_eval():
        gamma = jnp.linspace(gamma_min, gamma_max, _FIT_POINTS)
        alpha = np.asarray(by_name(name, vocab_size, gamma_min, gamma_max).alpha(gamma))
    if not 0.0 < alpha.min() <= alpha.max() <= 1.0:
        raise UserError(
            f"for gamma from {gamma_min:g} to {gamma_max:g} and {vocab_size} tokens the operator {name} gives signal levels "
            f"from {alpha.min():.3g} to {alpha.max():.3g}, outside (0, 1]; use the exact operator"
        )
