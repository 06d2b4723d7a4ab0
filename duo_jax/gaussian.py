"""The Gaussian side of the duality, as set in a config: the range of gamma, the curriculum, the distillation."""

from __future__ import annotations

import dataclasses

import jax
from ml_collections import ConfigDict

from duo_jax.diffusion import duality, operators
from duo_jax.errors import UserError

# A token that mixes more rows of the embedding than this is faster with one matrix product over the whole embedding.
_MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """`config.algo.curriculum`: how `duo` begins; static.

    Attributes:
        kind: `full` (the whole softmax) or `topk` (the efficient curriculum of paper II).
        start, end: the steps between which tau anneals; from `end` on, the loss is the discrete one.
        tau_log10_start, tau_log10_end: log10 of the softmax temperature tau at these steps.
        k: how many tokens `topk` keeps.
    """

    kind: str
    start: int
    end: int
    tau_log10_start: float
    tau_log10_end: float
    k: int


@dataclasses.dataclass(frozen=True)
class Distillation:
    """`config.algo.distillation`: how `dcd` compares student and teacher; static.

    Attributes:
        dt: how the time step dt grows: `doubling` or `linear`.
        round_length: training steps after which the teacher is replaced and, if doubling, dt doubles.
        n_steps: T; the first dt is 1/T.
        dt_start, dt_end: first and last dt of the linear growth, over all steps of the training.
        kl: `backward`, KL(student || teacher), or `forward`.
        teacher: the weights that replace the teacher's: `ema` or `student`.
    """

    dt: str
    round_length: int
    n_steps: int
    dt_start: float
    dt_end: float
    kl: str
    teacher: str


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The Gaussian side of the duality, for `duo` and `dcd`; static.

    Attributes:
        gamma_min, gamma_max: the range of gamma_t; alpha_t = T(gamma_t) falls from one end to the other.
        operator: the form of T, one of `operators.NAMES`.
        curriculum: settings of `duo`.
        distillation: settings of `dcd`.
        steps: the number of training steps.
    """

    gamma_min: float
    gamma_max: float
    operator: str
    curriculum: Curriculum
    distillation: Distillation
    steps: int

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> Gaussian:
        """Returns the settings of `config.algo`; computes an end of gamma's range that is None for the vocabulary."""
        algo = config.algo
        low, high = (
            operators.inverse(alpha, vocab_size) if given is None else given
            for given, alpha in ((algo.gamma_min, algo.alpha_max), (algo.gamma_max, algo.alpha_min))
        )
        if not low < high:
            raise UserError(f"config.algo.gamma_min = {low:.3f} must lie below config.algo.gamma_max = {high:.3f}.")
        operators.check_levels(algo.operator, vocab_size, low, high)
        curriculum, distil = Curriculum(**algo.curriculum), Distillation(**algo.distillation)
        return cls(low, high, algo.operator, curriculum, distil, config.train.steps)

    def entries(self, vocab_size: int) -> int | None:
        """Returns how many of the softmax's largest entries the network reads; None means all, drawn one by one.

        `full` reads only a few if tau is so small, as in the paper, that the others are zero to float32.
        """
        curriculum = self.curriculum
        if curriculum.kind == "topk":
            return curriculum.k
        largest_tau = 10.0 ** max(curriculum.tau_log10_start, curriculum.tau_log10_end)
        return duality.n_visible_entries(largest_tau, self.gamma_min, vocab_size, min(_MOST_ROWS, vocab_size // 8))

    def gamma(self, t: jax.Array) -> jax.Array:
        """Returns gamma_t, of t's shape."""
        return duality.gamma(t, self.gamma_min, self.gamma_max)

    def alpha(self, t: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
        """Returns alpha_t = T(gamma_t) and its derivative in t, each of t's shape."""
        operator = operators.by_name(self.operator, vocab_size, self.gamma_min, self.gamma_max)
        gamma = self.gamma(t)
        return operator.alpha(gamma), operator.dalpha(gamma) * (self.gamma_max - self.gamma_min)
