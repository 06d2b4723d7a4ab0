"""From noise to text: every diffusion sampler over any denoiser, as one `lax.scan` over its network calls.

A sampler starts from the prior (uniform tokens, or masks), walks a grid of times 1 = t_0 > ... > t_n = 1e-5 with one
network call a step, and ends with a noise-removal call at t_n. With a distilled network, n of 1 to 8 is the few-step
consistency sampler of *The Diffusion Duality*.

A denoiser is a function `denoise(states, sigma [B], visitor, needs_prediction [B, L], *per_token)`. It predicts from each
state (int32 `[B, L]`; one, or two under guidance) and returns `visitor(logits, *per_token)`, where `logits` is a tuple with
one `[..., K]` per state. Only the results where `needs_prediction` is true are used. It may call the visitor on a few tokens
at a time: with a network no `[B, L, K]` exists, and no logits are computed for tokens that need no prediction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from duo_jax.diffusion import absorbing, categorical, schedules, uniform
from duo_jax.diffusion.arrays import as_float, keys_of_rows, map_keys, numbered_keys
from duo_jax.errors import UserError
from duo_jax.sampling import ticks
from duo_jax.sampling.settings import Psi, Settings, as_psi, check_guidance, check_temperature, uses_nucleus

Denoise = Callable[..., Any]


@struct.dataclass
class Given:
    """The known tokens of a batch of texts: `tokens` where `held`, both `[B, L]`. Traced."""

    tokens: jax.Array
    held: jax.Array

    @classmethod
    def nothing(cls, shape: tuple[int, int]) -> Given:
        """Returns a batch of texts without known tokens."""
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))

    def fill(self, z: jax.Array) -> jax.Array:
        """Returns `z` with the known tokens put in."""
        return jnp.where(self.held, self.tokens, z)


@struct.dataclass
class Knobs:
    """Settings that may change from call to call without recompilation."""

    top_p: jax.typing.ArrayLike = 1.0
    temperature: jax.typing.ArrayLike = 1.0
    guidance: jax.typing.ArrayLike = 1.0


@struct.dataclass
class Walk:
    """What a sampler returns.

    Attributes:
        tokens: int32 `[B, L]`.
        network_calls: how often the network was evaluated, an int32 scalar; a guided step evaluates it twice.
        predictions: the number of tokens whose logits were computed, over all calls, an int32 scalar.
        trajectory: int32 `[n, B, L]`, the tokens after each step; None unless asked for.
    """

    tokens: jax.Array
    network_calls: jax.Array
    predictions: jax.Array
    trajectory: jax.Array | None = None


@struct.dataclass
class Carry:
    """What passes from one step to the next."""

    states: tuple[jax.Array, ...]  # z_t int32 [B, L]; under guidance also the unconditional one
    quiet: jax.Array  # [B], the number of steps since a row last changed
    calls: jax.Array
    predictions: jax.Array


@struct.dataclass
class Step:
    """The inputs of one step."""

    number: jax.Array  # 0, 1, ..., n
    alpha_t: jax.Array
    alpha_s: jax.Array
    kappa: jax.Array
    last: jax.Array  # whether this is the noise removal
    reported: jax.typing.ArrayLike = 0  # how many steps to report after this one


def steps(settings: Settings) -> Step:
    """Returns the time grid as stacked steps; noise removal is the step to alpha_s = 1."""
    n = settings.n_steps
    psi = settings.psi if settings.sampler == "psi" else Psi.throughout("pure-posterior")
    alpha_t = settings.schedule.alpha(jnp.asarray(psi.times(n, settings.schedule), jnp.float32))
    alpha_s = jnp.append(alpha_t[1:], 1.0)
    stacked = Step(
        number=jnp.arange(n + 1),
        alpha_t=alpha_t,
        alpha_s=alpha_s,
        kappa=psi.kappas(alpha_t, alpha_s),
        last=jnp.arange(n + 1) == n,
        reported=jnp.resize(ticks.increments(settings.network_calls), n + 1),
    )
    return jax.tree.map(lambda x: x[: settings.network_calls], stacked)


def prior(keys: jax.Array, length: int, vocab_size: int, settings: Settings) -> jax.Array:
    """Returns z_1, int32 `[B, length]`, each row drawn with its own of the keys `[B]`."""
    if settings.process == "absorbing":
        return jnp.full((len(keys), length), settings.mask_id, jnp.int32)
    return map_keys(lambda key: uniform.prior_sample(key, (length,), vocab_size), keys)


def _shape(logits: jax.Array, settings: Settings, knobs: Knobs) -> jax.Array:
    """Applies the temperature and top_p to logits `[..., K]`; for a score, only to which token is revealed."""
    if settings.process == "absorbing":
        logits = categorical.without(as_float(logits), settings.mask_id)
    shaped = as_float(logits) / knobs.temperature
    if settings.nucleus:
        shaped = categorical.nucleus(shaped, knobs.top_p)
    if settings.sampler == "analytic":
        # The score's total decides how much is revealed; temperature and top_p must not change it.
        shaped = shaped + (jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(shaped, axis=-1))[..., None]
    return shaped


def _draw_without_prediction(
    keys: jax.Array, z_t: jax.Array, step: Step, vocab_size: int, settings: Settings
) -> tuple[jax.Array, ...]:
    """Returns which tokens of z_t need a prediction, bool `[B, L]`, and z_s for the others."""
    mask = settings.mask_id
    if settings.guided:
        return jnp.ones(z_t.shape, bool), z_t
    if settings.sampler == "analytic":  # the score also decides whether a token is revealed
        return z_t == mask, z_t
    if settings.process == "absorbing":
        return absorbing.draw_without_prediction(keys, z_t, step.alpha_s, step.alpha_t, mask, step.kappa)
    needs_prediction, z_s = uniform.draw_without_prediction(
        keys, z_t, step.alpha_s, step.alpha_t, step.kappa, vocab_size
    )
    return needs_prediction | (step.last & (settings.noise_removal == "greedy")), z_s


def _draw_with_prediction(
    keys: jax.Array, logits: jax.Array, z_t: jax.Array, step: Step, settings: Settings
) -> jax.Array:
    """Draws z_s `[...]`, for tokens that need a prediction, from z_t `[...]` and shaped logits `[..., K]`."""

    def posterior() -> jax.Array:
        if settings.process == "uniform":
            return uniform.draw_with_prediction(keys, logits, z_t, step.alpha_s, step.alpha_t, step.kappa)
        drawn = functools.partial(absorbing.draw_with_prediction, keys, logits, settings.mask_id)
        if settings.sampler != "analytic":
            return drawn()
        # Noise removal reveals all that is still masked; a score that is too small would leave masks.
        dsigma = jnp.log(step.alpha_s) - jnp.log(step.alpha_t)
        score = functools.partial(absorbing.sedd_step, keys, logits, z_t, dsigma, settings.mask_id)
        return jax.lax.cond(step.last, drawn, score)

    if settings.noise_removal == "greedy":
        return jax.lax.cond(step.last, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32), posterior)
    return posterior()


def _log_table(logits: jax.Array, z_t: jax.Array, step: Step, settings: Settings) -> jax.Array:
    """Returns log q(z_s | z_t) as a table `[..., K]`, or log p for a greedy noise removal."""
    p = jax.nn.softmax(logits, axis=-1)
    mask = settings.mask_id
    if settings.process == "uniform":
        posterior, noise = uniform.posterior, 1.0 / p.shape[-1]
    else:
        posterior = functools.partial(absorbing.posterior, mask_id=mask)
        noise = jax.nn.one_hot(mask, p.shape[-1])
        p = jnp.where((z_t == mask)[..., None], p, jax.nn.one_hot(z_t, p.shape[-1]))
    again = step.alpha_s * posterior(p, z_t, 1.0, step.alpha_t) + (1.0 - step.alpha_s) * noise
    q = step.kappa * posterior(p, z_t, step.alpha_s, step.alpha_t) + (1.0 - step.kappa) * again
    if settings.noise_removal == "greedy":
        q = jnp.where(step.last, p, q)
    return jnp.log(q)


def _guide(conditional: jax.Array, free: jax.Array, g: jax.typing.ArrayLike) -> jax.Array:
    """Returns g log q_cond + (1-g) log q_uncond `[..., K]`, from two tables of logarithms that may hold -inf."""
    # A token outside the unconditional nucleus would get infinite weight: q_cond alone counts there.
    free = jnp.where(jnp.isneginf(free), conditional, free)
    impossible = jnp.isneginf(conditional)
    return jnp.where(impossible, -jnp.inf, g * jnp.where(impossible, 0.0, conditional) + (1.0 - g) * free)


def _draw_guided(
    keys: jax.Array,
    logits: tuple[jax.Array, ...],
    states: tuple[jax.Array, ...],
    step: Step,
    settings: Settings,
    g: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Draws z_s from softmax(g log q_cond + (1-g) log q_uncond), and the next state of the unconditional chain."""
    conditional, free = (_log_table(values, z_t, step, settings) for values, z_t in zip(logits, states, strict=True))
    mixed = _guide(conditional, free, g)
    pairs = map_keys(jax.random.split, keys)
    z_s, z_u = categorical.draw(pairs[..., 0], mixed), categorical.draw(pairs[..., 1], free)
    if settings.noise_removal == "greedy":
        z_s = jnp.where(step.last, jnp.argmax(mixed, axis=-1).astype(z_s.dtype), z_s)
    return z_s, z_u


def _draw(
    step: Step, settings: Settings, knobs: Knobs, logits: tuple, keys: jax.Array, states: tuple
) -> tuple[jax.Array, ...]:
    """Draws the next of each state, for tokens that need a prediction, from their logits `[..., K]`."""
    shaped = tuple(_shape(values, settings, knobs) for values in logits)
    if settings.guided:
        return _draw_guided(keys, shaped, states, step, settings, knobs.guidance)
    return (_draw_with_prediction(keys, shaped[0], states[0], step, settings),)


def _changes_something(carry: Carry, step: Step, needs_prediction: jax.Array, settings: Settings) -> jax.Array:
    """Returns whether a step with calls that may be skipped can change any text, a bool scalar."""
    if settings.early_stop:
        return step.last | jnp.any(carry.quiet < settings.early_stop)
    return jnp.any(needs_prediction)


def run(
    denoise: Denoise,
    keys: jax.Array,
    given: Given,
    vocab_size: int,
    settings: Settings,
    knobs: Knobs,
    unconditional: Given | None = None,
) -> Walk:
    """Returns texts sampled by one scan over the network calls.

    Known positions hold their clean tokens at every step, so the network sees them and the other tokens depend on them;
    docs/sampling.md explains what that means for the distribution.

    Args:
        denoise: see the module.
        keys: typed PRNG keys `[B]`, one per text: no text's draws depend on the other texts.
        given: the known tokens; their shape is that of the texts.
        vocab_size: K.
        settings: static; `process` is `uniform` or `absorbing`.
        knobs: `top_p` is used where `settings.nucleus`, `guidance` where `settings.guided`.
        unconditional: under guidance, what the unconditional prediction sees in place of `given`.
    """
    shape = given.tokens.shape
    pairs = map_keys(jax.random.split, keys)
    keys_of_prior, keys_of_steps = pairs[:, 0], pairs[:, 1]
    noise = prior(keys_of_prior, shape[1], vocab_size, settings)
    states = (given.fill(noise),)
    if settings.guided:
        states += (unconditional.fill(noise),)

    def take(carry: Carry, step: Step) -> tuple[Carry, jax.Array | None]:
        keys = keys_of_rows(map_keys(lambda key: jax.random.fold_in(key, step.number), keys_of_steps), shape[1])
        sigma = jnp.full(shape[:1], schedules.sigma(step.alpha_t))
        needs_prediction, settled = _draw_without_prediction(keys, carry.states[0], step, vocab_size, settings)
        if not settings.guided:
            needs_prediction &= ~given.held
        if settings.early_stop:
            stopped = (carry.quiet >= settings.early_stop) & ~step.last
            needs_prediction &= ~stopped[:, None]

        def move(states: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            visitor = functools.partial(_draw, step, settings, knobs)
            moved = denoise(states, sigma, visitor, needs_prediction, keys, states)
            z_s = given.fill(jnp.where(needs_prediction, moved[0], settled))
            if not settings.guided:
                return (z_s,)
            # The two texts differ only at the prompt's positions, where the unconditional one follows its own chain.
            return z_s, unconditional.fill(jnp.where(given.held, moved[1], z_s))

        networks = len(carry.states)
        costs = jnp.array([networks, networks * jnp.sum(needs_prediction)], jnp.int32)
        if settings.skips_calls:
            needed = _changes_something(carry, step, needs_prediction, settings)
            states = jax.lax.cond(needed, move, lambda states: states, carry.states)
            costs = jnp.where(needed, costs, 0)
        else:
            states = move(carry.states)
        quiet = carry.quiet
        if settings.early_stop:
            states = tuple(jnp.where(stopped[:, None], old, new) for old, new in zip(carry.states, states, strict=True))
            quiet = jnp.where(jnp.all(states[0] == carry.states[0], axis=-1), carry.quiet + 1, 0)
        if settings.reports_steps:
            ticks.report(step.reported, states[0][0, 0])
        carry = Carry(states, quiet, carry.calls + costs[0], carry.predictions + costs[1])
        return carry, states[0] if settings.trajectory else None

    nothing = jnp.zeros((), jnp.int32)
    start = Carry(states, jnp.zeros(shape[:1], jnp.int32), nothing, nothing)
    end, trajectory = jax.lax.scan(take, start, steps(settings))
    return Walk(end.states[0], end.calls, end.predictions, trajectory)


def walk(
    denoise_fn: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    shape: tuple[int, int],
    vocab_size: int,
    *,
    schedule: schedules.Schedule,
    n_steps: int,
    sampler: str = "ancestral",
    noise_removal: str = "ancestral",
    top_p: jax.typing.ArrayLike = 1.0,
    temperature: jax.typing.ArrayLike = 1.0,
    psi: Psi | str | None = None,
    process: str = "uniform",
    mask_id: int | None = None,
    score: bool = False,
    tokens: jax.typing.ArrayLike | None = None,
    held: jax.typing.ArrayLike | None = None,
    unconditional_fn: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    guidance: jax.typing.ArrayLike = 1.0,
    early_stop: int = 0,
    trajectory: bool = False,
) -> Walk:
    """Returns texts, the network calls and the trajectory, from a denoiser that returns all its log-probabilities at once.

    Pure, so it can be wrapped in `jax.jit`; otherwise each call compiles its scan again.

    Args:
        denoise_fn: `denoise_fn(z_t int32 [B, L], sigma [B]) -> log_p [B, L, K]`, in nats; log-scores with `score`.
        key: a PRNG key. The draws of row i are the same for every B (with JAX's default keys, threefry).
        shape: (B, L).
        vocab_size: K, the mask included.
        schedule: the noise schedule; sigma = -log alpha_t.
        n_steps: steps of the time grid.
        sampler: see `Settings`, also for `noise_removal`, `process`, `mask_id`, `score`, `early_stop`, `trajectory`.
        noise_removal: the last call.
        top_p: nucleus: a token is kept if the probabilities above its own sum to at most this; 1 keeps all.
        temperature: divides the logarithms of p.
        psi: for the `psi` sampler: a `Psi`, or one kappa mode for all steps.
        process: `uniform` or `absorbing`.
        mask_id: the absorbing state's id.
        score: whether `denoise_fn` returns log-scores (SEDD).
        tokens: int `[B, L]` or `[L]`, known tokens.
        held: bool of the same shape, where they are known.
        unconditional_fn: a second denoiser, from which `guidance` leads away: softmax(g log q + (1-g) log q_u).
        guidance: g; 1 is the first denoiser alone.
        early_stop: unchanged steps after which a row is left as it is.
        trajectory: whether to keep the tokens of every step.

    Raises:
        UserError: an invalid setting, or a denoiser whose result has another shape.
    """
    if process == "autoregressive":
        raise UserError("an autoregressive process has no denoiser; sample its network with duo_jax.sample.")
    if not all(callable(getattr(schedule, name, None)) for name in ("alpha", "dalpha", "inverse")):
        raise UserError(f"schedule is {schedule!r}; give one of duo_jax.diffusion.schedules, such as log_linear().")
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"shape is {shape}; give (B, L), both at least 1.")
    check_temperature(temperature)
    check_guidance(guidance)
    if unconditional_fn is None and (isinstance(guidance, jax.core.Tracer) or guidance != 1):
        raise UserError(
            "guidance leads away from a second denoiser; give it as unconditional_fn, or leave guidance at 1."
        )
    settings = Settings(
        n_steps=n_steps,
        sampler=sampler,
        noise_removal=noise_removal,
        schedule=schedule,
        nucleus=uses_nucleus(top_p),
        process=process,
        mask_id=mask_id,
        score=score,
        psi=as_psi(psi, sampler),
        guided=unconditional_fn is not None,
        early_stop=early_stop,
        trajectory=trajectory,
    )
    functions = (denoise_fn,) if unconditional_fn is None else (denoise_fn, unconditional_fn)

    def denoise(
        states: tuple[jax.Array, ...], sigma: jax.Array, visitor: Callable, needs_prediction: jax.Array, *per_token: Any
    ) -> Any:
        del needs_prediction  # the logits of all tokens are computed
        logits = tuple(function(z, sigma) for function, z in zip(functions, states, strict=True))
        for values in logits:
            if values.shape != (*shape, vocab_size):
                raise UserError(f"the denoiser returns {values.shape}; (B, L, K) is {(*shape, vocab_size)}.")
        return visitor(logits, *per_token)

    if (tokens is None) != (held is None):
        raise UserError("tokens and held (the mask of known tokens) belong together; give both or neither.")
    given = Given.nothing(shape)
    if tokens is not None:
        given = Given(
            jnp.broadcast_to(jnp.asarray(tokens, jnp.int32), shape), jnp.broadcast_to(jnp.asarray(held, bool), shape)
        )
    # Both denoisers see the same text; what else they know is up to them.
    keys, knobs = numbered_keys(key, shape[0]), Knobs(top_p, temperature, guidance)
    return run(denoise, keys, given, vocab_size, settings, knobs, given)


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
    top_p: jax.typing.ArrayLike = 1.0,
    **others: Any,
) -> jax.Array:
    """Returns the tokens of `walk`, int32 `[B, L]`; see there for all arguments.

    Raises:
        UserError: an invalid setting.
    """
    settings = {"sampler": sampler, "noise_removal": noise_removal, "top_p": top_p} | others
    return walk(denoise_fn, key, shape, vocab_size, schedule=schedule, n_steps=n_steps, **settings).tokens
