"""The static settings of a sampler: its kind, its time grid, and how much of each step is taken back (kappa)."""

from __future__ import annotations

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from duo_jax.config import NOISE_REMOVALS, SAMPLERS
from duo_jax.diffusion import schedules
from duo_jax.errors import UserError
from duo_jax.models.network import Network

PROCESSES = ("uniform", "absorbing", "autoregressive")
LAST_T = 1e-5

# The samplers of each process; for an autoregressive one, "ancestral" and "autoregressive" mean the same.
_FITTING = {
    "uniform": ("ancestral", "psi"),
    "absorbing": ("ancestral", "psi", "ancestral_cache", "analytic"),
    "autoregressive": ("ancestral", "autoregressive"),
}

# Longer names first, since a mode is matched by its beginning.
_KAPPA_MODES = ("pure-posterior", "pure-pc", "constant-remdm", "max-capped", "max-rescale", "constant")
_LEVEL = "linear-constant-linear"


def parse_mode(mode: str) -> tuple[str, float]:
    """Returns a kappa mode's name and its eta (0 where it has none): `max-capped-0.05` to `("max-capped", 0.05)`.

    Raises:
        UserError: an unknown name, or an eta that is missing or not in [0, 1].
    """
    name = next((name for name in _KAPPA_MODES if mode == name or mode.startswith(name + "-")), None)
    if name is None:
        raise UserError(
            f"the kappa mode is {mode!r}; choose one of {', '.join(_KAPPA_MODES)}, with a number as in constant-0.9."
        )
    rest = mode[len(name) + 1 :]
    if name.startswith("pure"):
        if rest:
            raise UserError(f"the kappa mode is {mode!r}; {name} takes no number.")
        return name, 0.0
    eta = _number(rest)
    if eta is None or not 0 <= eta <= 1:
        raise UserError(f"the kappa mode is {mode!r}; {name} needs a number in [0, 1], as in {name}-0.05.")
    return name, eta


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@dataclasses.dataclass(frozen=True)
class Psi:
    """The steps of a Psi-sampler (The Diffusion Duality, Chapter II, arXiv 2602.21185).

    The grid's n + 1 times are cut into three segments. Each has a kappa mode: `pure-posterior` (kappa = 1),
    `pure-pc` (0), `constant-ETA` (ETA), and ReMDM's (arXiv 2503.00307), kappa = clip(1 - s / (1 - alpha_s), 0, 1), with
    s = ETA (`constant-remdm-ETA`), min(ETA, (1-alpha_s)/alpha_t) (`max-capped-ETA`) or ETA min(1, (1-alpha_s)/alpha_t)
    (`max-rescale-ETA`). A smaller kappa redraws more tokens.

    Attributes:
        high: the mode where the noise is high, at the beginning.
        middle: the mode in between.
        low: the mode at the end.
        high_frac: the first segment's share of the grid.
        middle_frac: the middle segment's share.
        time_profile: `linear`; or `linear-constant-linear-C`, which stays at the time C in the middle segment;
            or `linear-constant-linear-C-inv`, which stays where alpha is C.
    """

    high: str = "max-capped-0.02"
    middle: str = "max-capped-0.02"
    low: str = "max-capped-0.02"
    high_frac: float = 0.0
    middle_frac: float = 0.0
    time_profile: str = "linear"

    def __post_init__(self) -> None:
        for mode in (self.high, self.middle, self.low):
            parse_mode(mode)
        if self.high_frac < 0 or self.middle_frac < 0 or self.high_frac + self.middle_frac > 1:
            raise UserError(
                f"psi's high_frac is {self.high_frac} and middle_frac {self.middle_frac}; neither may be negative, nor "
                "their sum above 1."
            )
        if self.time_profile != "linear" and self._level() is None:
            raise UserError(
                f"psi's time_profile is {self.time_profile!r}; give linear, or {_LEVEL}-C with a time C in (0, 1), or "
                f"{_LEVEL}-C-inv with a signal level C in (0, 1)."
            )

    @classmethod
    def throughout(cls, mode: str) -> Psi:
        """Returns a Psi with one kappa mode for every step."""
        return cls(mode, mode, mode)

    @classmethod
    def from_config(cls, sample_config: ConfigDict) -> Psi | None:
        """Returns the Psi of `config.sample`, or None if its sampler is not `psi`."""
        return cls(**sample_config.psi) if sample_config.sampler == "psi" else None

    def _level(self) -> tuple[float, bool] | None:
        if not self.time_profile.startswith(_LEVEL + "-"):
            return None
        text = self.time_profile[len(_LEVEL) + 1 :]
        level = _number(text.removesuffix("-inv"))
        return (level, text.endswith("-inv")) if level is not None and 0 < level < 1 else None

    def segments(self, n_steps: int) -> tuple[int, int, int]:
        """Returns how many of the n + 1 times lie in each segment."""
        points = n_steps + 1
        high = round(self.high_frac * points)
        middle = min(round(self.middle_frac * points), points - high)
        return high, middle, points - high - middle

    def times(self, n_steps: int, schedule: schedules.Schedule) -> np.ndarray:
        """Returns the grid `[n + 1]` from 1 down to 1e-5, or to the constant level if the last segment has only one time."""
        if (level := self._level()) is None:
            return np.linspace(1.0, LAST_T, n_steps + 1)
        value, inverse = level
        with jax.ensure_compile_time_eval():
            at = float(schedule.inverse(value)) if inverse else value
        if not LAST_T < at < 1.0:
            raise UserError(
                f"psi's time_profile {self.time_profile} has its constant level at t = {at:g}, outside (1e-5, 1)."
            )
        high, middle, low = self.segments(n_steps)
        if not high or not low:
            raise UserError(
                f"psi's time_profile {self.time_profile} needs steps before and after its constant level: "
                f"n_steps = {n_steps}, high_frac = {self.high_frac}, middle_frac = {self.middle_frac} leave none."
            )
        lines = np.linspace(1.0, at, high), np.full(middle, at), np.linspace(at, LAST_T, low)
        return np.concatenate(lines)

    def kappas(self, alpha_t: jax.Array, alpha_s: jax.Array) -> jax.Array:
        """Returns kappa for the steps from `alpha_t [n+1]` to `alpha_s [n+1]`, the noise removal last."""
        high, middle, low = self.segments(alpha_t.shape[0] - 1)
        modes = jnp.repeat(jnp.arange(3), np.array([high, middle, low]), total_repeat_length=high + middle + low)
        by_segment = jnp.stack([kappa(mode, alpha_t, alpha_s) for mode in (self.high, self.middle, self.low)])
        return by_segment[modes, jnp.arange(alpha_t.shape[0])]


def kappa(mode: str, alpha_t: jax.Array, alpha_s: jax.Array) -> jax.Array:
    """Returns the share of the posterior in a Psi step, `[...]` like the signal levels; see `Psi`."""
    name, eta = parse_mode(mode)
    if name == "pure-posterior":
        return jnp.ones_like(alpha_t)
    if name == "pure-pc":
        return jnp.zeros_like(alpha_t)
    if name == "constant":
        return jnp.full_like(alpha_t, eta)
    noise = 1.0 - alpha_s
    cap = noise / alpha_t
    sigma = {"constant-remdm": eta, "max-capped": jnp.minimum(eta, cap), "max-rescale": eta * jnp.minimum(1.0, cap)}[
        name
    ]
    # In the noise removal alpha_s = 1, and both parts of the step are the same.
    return jnp.where(noise > 0, jnp.clip(1.0 - sigma / jnp.where(noise > 0, noise, 1.0), 0.0, 1.0), 1.0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The static settings of a sampler, hashable: one program is compiled for each.

    Attributes:
        n_steps: steps of the time grid, 1 or more; the noise removal is one more network call. Not used by an
            autoregressive network, which takes one call per token.
        sampler: `ancestral`, the posterior q(z_s | z_t, x = p); `psi`, which also redraws tokens (see `Psi`); for
            absorbing states also `ancestral_cache`, the same texts as `ancestral` without the calls that change nothing,
            and `analytic` (SEDD); `autoregressive`.
        noise_removal: what is done at the end: `ancestral` draws from the posterior at alpha_s = 1, `greedy` takes the
            most probable token at each position, `none` leaves the last z_t.
        schedule: the noise schedule that the network was trained with.
        nucleus: whether `top_p` (a traced value) filters the denoiser's distribution.
        process: `uniform`, `absorbing` or `autoregressive`.
        mask_id: the id of the absorbing state, which never occurs in text.
        score: whether the denoiser gives SEDD's log-scores rather than log-probabilities.
        psi: the steps of the `psi` sampler.
        guided: whether a second, unconditional prediction guides the first.
        early_stop: a row is final after this many successive steps without a change, and the network is not called once
            all rows are final; 0 turns this off. For the uniform process only.
        trajectory: whether the tokens after every network call are kept.
        reports_steps: whether the program reports its steps to the host (see `ticks`); on one device only.
    """

    n_steps: int
    sampler: str = "ancestral"
    noise_removal: str = "ancestral"
    schedule: schedules.Schedule = dataclasses.field(default_factory=schedules.log_linear)
    nucleus: bool = False
    process: str = "uniform"
    mask_id: int | None = None
    score: bool = False
    psi: Psi = dataclasses.field(default_factory=Psi)
    guided: bool = False
    early_stop: int = 0
    trajectory: bool = False
    reports_steps: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.n_steps, numbers.Integral):
            raise UserError(f"n_steps is {self.n_steps!r}; it must be a whole number.")
        if self.n_steps < 1:
            raise UserError(f"n_steps is {self.n_steps}; a sampler takes at least 1 step.")
        for name, value, allowed in (
            ("sampler", self.sampler, SAMPLERS),
            ("noise_removal", self.noise_removal, NOISE_REMOVALS),
            ("process", self.process, PROCESSES),
        ):
            if value not in allowed:
                raise UserError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")
        if self.sampler not in _FITTING[self.process]:
            raise UserError(
                f"sampler is {self.sampler!r}, which does not fit a network of the {self.process} process; "
                f"choose one of {', '.join(_FITTING[self.process])}."
            )
        if self.process == "absorbing" and self.mask_id is None:
            raise UserError("the absorbing process needs mask_id, the id of its masked tokens.")
        if self.process == "uniform" and self.score:
            raise UserError("log-scores are for the absorbing process; give process='absorbing', or leave score out.")
        if self.sampler == "analytic" and not self.score:
            raise UserError(
                "sampler is 'analytic', which needs log-scores as SEDD gives them; choose ancestral or psi."
            )
        if self.early_stop < 0:
            raise UserError(
                f"early_stop is {self.early_stop}; give a number of unchanged steps, or 0 to never stop early."
            )
        if self.early_stop and self.process != "uniform":
            raise UserError(
                f"early_stop is for uniform-state networks, not for the {self.process} process; an absorbing state's "
                "ancestral_cache leaves out the calls that change nothing without guessing."
            )
        if self.process == "autoregressive":
            for name, value, default in (
                ("noise_removal", self.noise_removal, "ancestral"),
                ("trajectory", self.trajectory, False),
                ("guidance", self.guided, False),
            ):
                if value != default:
                    raise UserError(f"{name} is for diffusion networks; an autoregressive one draws each token once.")
        if self.guided and self.sampler in ("analytic", "ancestral_cache"):
            raise UserError(
                f"guidance mixes posteriors, which the sampler {self.sampler} does not draw from; choose ancestral or psi."
            )
        self.psi.times(self.n_steps, self.schedule)

    @classmethod
    def for_network(
        cls,
        network: Network,
        n_steps: int,
        *,
        sampler: str = "ancestral",
        noise_removal: str = "ancestral",
        top_p: float = 1.0,
        **others: object,
    ) -> Settings:
        """Returns settings with the process and schedule that a network was trained with; `others` are fields of the class.

        Raises:
            UserError: an invalid setting.
        """
        process = network.process
        if process == "autoregressive":
            # These two change nothing: check them, then fix them, so that they do not compile another program.
            cls(n_steps, sampler, noise_removal, process=process)
            n_steps, sampler = 1, "autoregressive"
        # D3PM's chain has alpha = 1 - t.
        schedule = (
            schedules.log_linear(0.0) if network.algo == "d3pm" else schedules.by_name(network.schedule, network.eps)
        )
        return cls(
            n_steps,
            sampler,
            noise_removal,
            schedule,
            uses_nucleus(top_p),
            process,
            None if process == "uniform" else network.mask_id,
            network.algo == "sedd",
            **others,
        )

    @classmethod
    def from_config(cls, sample_config: ConfigDict, network: Network) -> Settings:
        """Returns the settings of `config.sample`, for a network.

        Raises:
            UserError: an invalid setting.
        """
        return cls.for_network(
            network,
            sample_config.n_steps,
            sampler=sample_config.sampler,
            noise_removal=sample_config.noise_removal,
            top_p=sample_config.top_p,
            psi=as_psi(Psi.from_config(sample_config), sample_config.sampler),
            early_stop=sample_config.early_stop,
        )

    @property
    def network_calls(self) -> int:
        """The largest number of steps that call a diffusion network."""
        return self.n_steps + (self.noise_removal != "none")

    @property
    def skips_calls(self) -> bool:
        """Whether steps that change nothing skip their network call."""
        return self.early_stop > 0 or self.sampler == "ancestral_cache"


def as_psi(psi: Psi | str | None, sampler: str) -> Psi:
    """Returns a `Psi` from itself, from one kappa mode for all steps, or the default from None.

    Raises:
        UserError: an unknown mode, or a `psi` with another sampler.
    """
    if psi is None:
        return Psi()
    if sampler != "psi":
        raise UserError(f"psi was given, but the sampler is {sampler!r}; choose the sampler 'psi', or leave psi out.")
    if not isinstance(psi, str | Psi):
        raise UserError(f"psi is {psi!r}; give one kappa mode, such as 'constant-0.9', or a duo_jax.sampling.Psi.")
    return Psi.throughout(psi) if isinstance(psi, str) else psi


def uses_nucleus(top_p: jax.typing.ArrayLike) -> bool:
    """Returns whether `top_p` may remove tokens, as a traced value may.

    Raises:
        UserError: `top_p` is not in (0, 1].
    """
    if isinstance(top_p, jax.core.Tracer):
        return True
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be in (0, 1], where 1 keeps every token.")
    return bool(top_p < 1)


def check_guidance(guidance: jax.typing.ArrayLike) -> None:
    """Raises UserError unless a guidance weight is a finite number."""
    if not isinstance(guidance, jax.core.Tracer) and not np.isfinite(guidance):
        raise UserError(f"guidance is {guidance}; it must be a finite number, where 1 is none.")


def check_temperature(temperature: jax.typing.ArrayLike) -> None:
    """Raises UserError unless a temperature is finite, and at least 0.001, which is as good as greedy."""
    if not isinstance(temperature, jax.core.Tracer) and not 1e-3 <= temperature < math.inf:
        raise UserError(
            f"temperature is {temperature}; it must be a finite number of at least 0.001, where 1 leaves the network's "
            "distribution as it is."
        )
