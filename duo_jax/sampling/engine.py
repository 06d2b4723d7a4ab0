"""From noise to text: samplers over any denoiser, each one `lax.scan` over its network calls.

A sampler starts from the prior (uniform tokens), walks a grid of times 1 = t_0 > ... > t_n = 1e-5 with one network call a
step, and ends with a noise-removal call at t_n. With a distilled network, n of 1 to 8 is the few-step consistency sampler.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from duo_jax.diffusion import categorical, schedules, uniform
from duo_jax.diffusion.arrays import token_keys
from duo_jax.errors import UserError
from duo_jax.models.network import Network, Predict

SAMPLERS = ("ancestral",)
NOISE_REMOVALS = ("ancestral", "greedy", "none")
LAST_T = 1e-5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static about a sampler: one program is compiled for each.

    Attributes:
        n_steps: steps of the time grid, 1 or more; the noise removal is one more network call.
        sampler: `ancestral`, the posterior q(z_s | z_t, x = p).
        noise_removal: what is done at the end: `ancestral` draws from the posterior at alpha_s = 1, `greedy` takes the most
            probable token at each position, `none` leaves the last z_t.
        schedule: the noise schedule that the network was trained with.
        nucleus: whether `top_p` (a traced value) filters the denoiser's distribution.
    """

    n_steps: int
    sampler: str = "ancestral"
    noise_removal: str = "ancestral"
    schedule: schedules.Schedule = dataclasses.field(default_factory=schedules.log_linear)
    nucleus: bool = False

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise UserError(f"n_steps is {self.n_steps}; a sampler takes at least 1 step.")
        if self.sampler not in SAMPLERS:
            raise UserError(f"the sampler is {self.sampler!r}; choose one of {', '.join(SAMPLERS)}.")
        if self.noise_removal not in NOISE_REMOVALS:
            raise UserError(f"noise_removal is {self.noise_removal!r}; choose one of {', '.join(NOISE_REMOVALS)}.")

    @classmethod
    def for_network(cls, network: Network, n_steps: int, *, sampler: str, noise_removal: str, top_p: float) -> Settings:
        """Returns the settings with the schedule that a network was trained with.

        Raises:
            UserError: a setting that cannot be.
        """
        return cls(
            n_steps, sampler, noise_removal, schedules.by_name(network.schedule, network.eps), uses_nucleus(top_p)
        )

    @property
    def network_calls(self) -> int:
        """How often the network is evaluated."""
        return self.n_steps + (self.noise_removal != "none")


def uses_nucleus(top_p: jax.typing.ArrayLike) -> bool:
    """Returns whether `top_p` removes anything; a traced value may.

    Raises:
        UserError: `top_p` is not in (0, 1].
    """
    if isinstance(top_p, jax.core.Tracer):
        return True
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be in (0, 1], where 1 keeps every token.")
    return top_p < 1


@struct.dataclass
class Carry:
    """What passes from one step to the next."""

    z_t: jax.Array  # int32 [B, L]


@struct.dataclass
class Step:
    """What is known of a step before it is taken."""

    key: jax.Array
    alpha_t: jax.Array
    alpha_s: jax.Array
    last: jax.Array  # whether this is the noise removal


def _steps(key: jax.Array, settings: Settings) -> Step:
    """Returns the time grid as stacked steps; noise removal is the step to alpha_s = 1."""
    t = jnp.linspace(1.0, LAST_T, settings.n_steps + 1)
    alpha_t = settings.schedule.alpha(t)
    alpha_s = jnp.append(alpha_t[1:], 1.0)
    steps = Step(
        key=jax.random.split(key, settings.n_steps + 1),
        alpha_t=alpha_t,
        alpha_s=alpha_s,
        last=jnp.arange(settings.n_steps + 1) == settings.n_steps,
    )
    return jax.tree.map(lambda x: x[: settings.network_calls], steps)


def run(
    predict: Predict,
    key: jax.Array,
    shape: tuple[int, int],
    vocab_size: int,
    settings: Settings,
    top_p: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """Returns tokens int32 `[B, L]`, sampled by one scan over the network calls.

    Args:
        predict: `predict(z_t, sigma [B], visitor, *per_token)`, as `Network.predict` makes it.
        key: a typed PRNG key.
        shape: (B, L).
        vocab_size: K.
        settings: static.
        top_p: used where `settings.nucleus`.
    """
    key_prior, key_steps = jax.random.split(key)

    def take(carry: Carry, step: Step) -> tuple[Carry, None]:
        def visitor(logits: jax.Array, keys: jax.Array, z_t: jax.Array) -> jax.Array:
            if settings.nucleus:
                logits = categorical.nucleus(logits, top_p)
            alpha_s, alpha_t = (jnp.full(z_t.shape, a) for a in (step.alpha_s, step.alpha_t))
            z_s = uniform.mixture_step(keys, logits, z_t, alpha_s, alpha_t)
            if settings.noise_removal == "greedy":
                z_s = jnp.where(step.last, jnp.argmax(logits, axis=-1).astype(z_s.dtype), z_s)
            return z_s

        sigma = jnp.full(shape[:1], schedules.sigma(step.alpha_t))
        return Carry(predict(carry.z_t, sigma, visitor, token_keys(step.key, shape), carry.z_t)), None

    start = Carry(uniform.prior_sample(key_prior, shape, vocab_size))
    return jax.lax.scan(take, start, _steps(key_steps, settings))[0].z_t


@functools.partial(jax.jit, static_argnames=("network", "shape", "settings", "shards"))
def sample_tokens(
    weights: Any,
    key: jax.Array,
    top_p: jax.typing.ArrayLike,
    *,
    network: Network,
    shape: tuple[int, int],
    settings: Settings,
    shards: int = 1,
) -> jax.Array:
    """Returns tokens int32 `[B, L]` from a network; compiled once for each shape and settings, not for a key or `top_p`."""
    return run(network.predict(weights, shards=shards), key, shape, network.vocab_size, settings, top_p)


def generate(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    shape: tuple[int, int],
    vocab_size: int,
    *,
    schedule: schedules.Schedule,
    n_steps: int,
    sampler: str = "ancestral",
    noise_removal: str = "ancestral",
    top_p: float = 1.0,
) -> jax.Array:
    """Returns tokens int32 `[B, L]` from a denoiser that gives all its log-probabilities at once.

    Pure, so it can be wrapped in `jax.jit`; without that, each call compiles its scan anew.

    Args:
        denoise_fn: `denoise_fn(z_t int32 [B, L], sigma [B]) -> log_p [B, L, K]`.
        key: a PRNG key.
        shape: (B, L).
        vocab_size: K.
        schedule: the noise schedule; sigma = -log alpha_t.
        n_steps: steps of the time grid.
        sampler: see `Settings`.
        noise_removal: see `Settings`.
        top_p: nucleus: the smallest set of tokens with this much probability is kept; 1 keeps all.

    Raises:
        UserError: a setting that cannot be.
    """
    settings = Settings(n_steps, sampler, noise_removal, schedule, uses_nucleus(top_p))

    def predict(z_t: jax.Array, sigma: jax.Array, visitor: Callable, *per_token: jax.Array) -> jax.Array:
        return visitor(denoise_fn(z_t, sigma), *per_token)

    return run(predict, key, shape, vocab_size, settings, top_p)


def unigram_entropy(tokens: np.ndarray) -> np.ndarray:
    """Returns each row's entropy in nats over its own token frequencies, `[B]`; low means that it repeats itself."""
    rows = []
    for row in np.asarray(tokens):
        share = np.unique(row, return_counts=True)[1] / row.size
        rows.append(-np.sum(share * np.log(share)))
    return np.asarray(rows)
